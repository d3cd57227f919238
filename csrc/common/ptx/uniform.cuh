// Values that all lanes of a warp share, and what the compiler must be told of them: a loop that counts every
// instruction wants them in the scalar unit's registers, and computed once.
#pragma once

#include <cstdint>

namespace fastkernels {

// The same value, which the compiler then keeps in a register instead of computing it again wherever it is used.
__device__ __forceinline__ uint32_t keep(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same value, known to be that of all lanes, all of which take part.
__device__ __forceinline__ uint32_t uniform(uint32_t x) {
    return __shfl_sync(0xffffffffu, keep(x), 0);
}

}  // namespace fastkernels
