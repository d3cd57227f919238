// Brings a line of global memory to L2 without reading it: what a kernel does about its weights before pdl_wait().
// Nothing is read, so it is right whoever wrote the memory, and however lately.
#pragma once

namespace fastkernels {

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace fastkernels
