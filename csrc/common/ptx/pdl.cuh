// Programmatic dependent launch: a kernel launched with LaunchConfig::pdl may start while the kernel before it
// still runs. It prefetches what no kernel of the chain writes (weights), then waits, then reads activations.
#pragma once

namespace fastkernels {

// Returns when every kernel before this one has finished and its writes are visible.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be scheduled as this one's leave room. Says nothing about memory.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

}  // namespace fastkernels
