// mma.sync m16n8k32 of unsigned and signed bytes (sm_80): C [16, 8] += A [16, 32] B [32, 8] by one warp, int32 sums, in
// the layout of mma.cuh's products of 32 bytes along K.
#pragma once

#include <cstdint>

#include "common/ptx/mma.cuh"

namespace fastkernels {

// A unsigned, B signed.
__device__ __forceinline__ void mma_m16n8k32_u8_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastkernels
