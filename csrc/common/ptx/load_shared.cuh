// Loads from shared memory by address.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ float load_shared(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// Aligned to 8 bytes.
__device__ __forceinline__ float2 load_shared_2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

// Aligned to 16 bytes.
__device__ __forceinline__ float4 load_shared_4(uint32_t address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

}  // namespace fastkernels
