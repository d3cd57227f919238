// cp.async (sm_80): copies from global to shared memory that pass no register and complete in groups, in order.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, both addresses aligned to 16. Where valid is false the source is not read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, bool valid) {
    const int size = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(size)
                 : "memory");
}

// Closes the group of this thread's copies since the last one; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are incomplete. Other threads' copies need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fastkernels
