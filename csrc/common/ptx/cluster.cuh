// Thread block clusters (sm_90): blocks that run together and reach into each other's shared memory. Before sm_90, and
// in a kernel launched without a cluster, a block is a cluster of its own.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return static_cast<int>(size);
#else
    return 1;
#endif
}

// A barrier of all threads of the cluster; writes to any block's shared memory before it are visible after it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release;\n\t"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
#else
    __syncthreads();
#endif
}

// The variable of block `rank` that is p, in shared memory, in this block. That block must not have ended.
template <typename T>
__device__ __forceinline__ T* in_block(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
    T* other;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(p), "r"(rank));
    return other;
#else
    return p;
#endif
}

}  // namespace fastkernels
