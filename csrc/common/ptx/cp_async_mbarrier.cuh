// cp.async (sm_80) whose completion counts as an arrival at an mbarrier.
#pragma once

#include <cstdint>

namespace fastkernels {

// 4 bytes, through L1; both addresses aligned to 4.
__device__ __forceinline__ void cp_async_4(uint32_t destination, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(source) : "memory");
}

// Arrives, once this thread's copies so far are complete. The barrier counts it among its arrivals.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace fastkernels
