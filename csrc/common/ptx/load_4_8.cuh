// As load_16.cuh, of 4 and 8 bytes.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint32_t load_4_here(const void* p) {
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 load_8_here(const void* p) {
    uint2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

}  // namespace fastkernels
