// Stores to the shared memory of another block of the cluster (sm_90) that count at an mbarrier there, so that sums are
// handed on without a fence.
#pragma once

#include <cstdint>

namespace fastkernels {

// The same place in shared memory of block `rank`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
    uint32_t other;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(address), "r"(rank));
    return other;
}

// 16 bytes, aligned, to an address_in_block(), that count as bytes at an mbarrier of that block: who waits for the
// phase sees them. In a kernel launched as a cluster.
__device__ __forceinline__ void store_async(uint32_t to, uint4 x, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
        : "memory");
}

}  // namespace fastkernels
