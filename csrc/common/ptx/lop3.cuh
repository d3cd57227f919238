// (x & mask) | bits in one instruction: left to itself, the compiler takes two where both are constants.
#pragma once

#include <cstdint>

namespace fastkernels {

__host__ __device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
#ifdef __CUDA_ARCH__
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
#else
    return (x & mask) | bits;
#endif
}

}  // namespace fastkernels
