// stmatrix (sm_90): four 8x8 matrices of 16-bit elements from the fragments of mma and wgmma to shared memory. Lane l
// gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned), and in d[i] what ldmatrix would have left there.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t d0, uint32_t d1, uint32_t d2, uint32_t d3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(d0), "r"(d1),
                 "r"(d2), "r"(d3)
                 : "memory");
}

// The same, each matrix transposed: the address of lane l is that of column l % 8.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t d0, uint32_t d1, uint32_t d2,
                                                       uint32_t d3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(d0),
                 "r"(d1), "r"(d2), "r"(d3)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

}  // namespace fastkernels
