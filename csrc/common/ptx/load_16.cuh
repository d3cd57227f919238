// A 16-byte load of data that is read again: through L1, and issued where it stands among other volatile instructions.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint4 load_16_here(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

}  // namespace fastkernels
