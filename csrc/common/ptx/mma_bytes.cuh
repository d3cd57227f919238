// mma.sync of fp8 on GPUs without it, and of e5m2: C [16, 8] += A [16, 32] B [32, 8] by one warp, fp32 accumulators,
// in the layout of mma.cuh's products of 32 bytes along K.
//
// A lane's four bytes are neighbours along K, of A and of B alike, so any two of them may be a pair of fp16: the even
// ones and the odd ones. Every e4m3 and e5m2 is an fp16, and so are products exact.
#pragma once

#include <cuda_fp8.h>

#include "common/ptx/mma.cuh"

namespace fastkernels {

// Bytes 0 and 2, and 1 and 3, as fp16. NaN stays NaN.
template <typename Byte>
__device__ __forceinline__ void to_halves(uint32_t bytes, uint32_t& even, uint32_t& odd) {
    if constexpr (std::is_same_v<Byte, __nv_fp8_e5m2>) {  // the upper byte of an fp16
        even = bytes << 8 & 0xff00ff00u;
        odd = bytes & 0xff00ff00u;
    } else {
        static_assert(std::is_same_v<Byte, __nv_fp8_e4m3>);
        // Exponent and mantissa a bit lower are the fp16 of 2^-8 times the value, of NaN that of 480, which alone
        // becomes infinity times 137, and NaN times 0.
        const auto whole = [](uint32_t pair) {
            const __half2 small = *reinterpret_cast<const __half2*>(&pair);
            const __half2 value = __hmul2(small, __half2half2(__ushort_as_half(0x5c00)));     // 256
            const __half2 overflow = __hmul2(small, __half2half2(__ushort_as_half(0x7848)));  // 256 * 137
            const __half2 result = __hfma2(overflow, __half2half2(__ushort_as_half(0)), value);
            return *reinterpret_cast<const uint32_t*>(&result);
        };
        even = whole((bytes << 8 & 0x80008000u) | (bytes << 7 & 0x3f803f80u));
        odd = whole((bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u));
    }
}

// A's words of a lane as those of two products of 16 fp16 along K: of a[0] and a[1], then of a[2] and a[3].
template <typename Byte>
__device__ __forceinline__ void to_halves(const uint32_t (&a)[4], uint32_t (&halves)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to_halves<Byte>(a[i], halves[i / 2][i % 2], halves[i / 2][2 + i % 2]);
    }
}

// C += A B, A and B of fp8 as fp16.
template <typename B>
__device__ __forceinline__ void mma_halves(float (&c)[4], const uint32_t (&a)[2][4], uint32_t b0, uint32_t b1) {
    uint32_t even, odd;
    to_halves<B>(b0, even, odd);
    mma_m16n8k16<fp16>(c, a[0], even, odd);
    to_halves<B>(b1, even, odd);
    mma_m16n8k16<fp16>(c, a[1], even, odd);
}

// The instruction, which takes sm_89. There it adds up with about 14 bits; on Hopper ptxas makes products of fp16 of
// it.
template <typename A, typename B>
__device__ __forceinline__ void mma_m16n8k32_fp8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
    if constexpr (std::is_same_v<A, __nv_fp8_e4m3> && std::is_same_v<B, __nv_fp8_e4m3>) {
        mma_m16n8k32_e4m3(c, a, b0, b1);
    } else if constexpr (std::is_same_v<A, __nv_fp8_e4m3>) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(std::is_same_v<B, __nv_fp8_e4m3>);
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

}  // namespace fastkernels
