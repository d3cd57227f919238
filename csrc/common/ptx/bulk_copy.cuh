// Bulk copies (sm_90): neighbouring bytes from global to shared memory, one instruction of one thread, completing on an
// mbarrier.
#pragma once

#include <cstdint>

namespace fastkernels {

// Both addresses and the number of bytes are multiples of 16. policy: of tma.cuh.
__device__ __forceinline__ void bulk_load(uint32_t destination, const void* source, int bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(destination),
        "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

}  // namespace fastkernels
