// Atomics on global memory that order what lies around them, where __threadfence() before and after would order more.
#pragma once

#include <cstdint>

namespace fastkernels {

// Adds 1 to *x, or makes it 0 where it is `last`; returns what it was. Who reads n sees what was written before n.
__device__ __forceinline__ uint32_t atomic_inc_acq_rel(uint32_t* x, uint32_t last) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(x), "r"(last) : "memory");
    return before;
}

}  // namespace fastkernels
