// The barrier of a cluster in two halves (sm_90), for work between them: every thread of the cluster arrives once and
// waits once.
#pragma once

namespace fastkernels {

// Writes before it, to any block's shared memory, are visible behind the wait.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// Orders nothing but mbarrier_init_fence()'s: the other waits for all of a thread's stores, to the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

}  // namespace fastkernels
