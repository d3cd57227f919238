// What blocks of a cluster (sm_90) need to hand each other sums without a fence: the cluster's barrier that orders
// nothing, and stores to another block's shared memory that count at an mbarrier there. A cluster_sync(), or an arrival
// at the cluster's barrier that releases what was written, waits for all of a thread's stores, to the whole GPU.
#pragma once

#include <cstdint>

namespace fastkernels {

// The cluster's barrier in two steps, for all of its threads. Orders no accesses but mbarrier_init_fence()'s.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait;" ::: "memory");
}

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
