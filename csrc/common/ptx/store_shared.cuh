// Stores to shared memory by address.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ void store_shared_8(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Aligned to 2 bytes.
__device__ __forceinline__ void store_shared_16(uint32_t address, uint16_t x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}

}  // namespace fastkernels
