// A cp.async of 4 bytes, for what need not be aligned to 16; it belongs to a group as the others (cp_async.cuh).
#pragma once

#include <cstdint>

namespace fastkernels {

// Where valid is false the source is not read and zeros are written.
__device__ __forceinline__ void cp_async_4(uint32_t destination, const void* source, bool valid) {
    const int size = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(size) : "memory");
}

}  // namespace fastkernels
