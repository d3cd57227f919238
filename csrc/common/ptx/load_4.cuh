// A 4-byte load of data that is read again: through L1, and issued where it stands among other volatile instructions.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint32_t load_4_here(const void* p) {
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

}  // namespace fastkernels
