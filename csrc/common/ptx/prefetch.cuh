// Brings a line of global memory to L2 without reading it: what a kernel does about its weights before pdl_wait().
// Nothing is read, so it is right whoever wrote the memory, and however lately.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// A run of bytes, a multiple of 16 at an address aligned to 16. Nothing before sm_90.
__device__ __forceinline__ void prefetch_l2_bulk(const void* address, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

}  // namespace fastkernels
