// One vector register of floats, its width that of the instruction set the file is compiled for: the compiler's
// vector extension, so that the same source serves x86-64 and aarch64. Included by kernel files only.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/cpu/dtype.h"

namespace fastkernels::cpu::FK_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(kWidth * sizeof(float))));

inline Vec load(const float* x) {
    Vec v;
    std::memcpy(&v, x, sizeof(v));
    return v;
}

inline void store(float* x, Vec v) {
    std::memcpy(x, &v, sizeof(v));
}

inline Vec load(const bf16* x) {
    using Narrow = uint16_t __attribute__((vector_size(kWidth * sizeof(uint16_t))));
    using Wide = uint32_t __attribute__((vector_size(kWidth * sizeof(uint32_t))));
    Narrow bits;
    std::memcpy(&bits, x, sizeof(bits));
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    return std::bit_cast<Vec>(wide);
}

inline Vec load(const fp16* x) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return std::bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bits));  // the plain form warns in gcc 12
#elif defined(__AVX2__)
    return std::bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
    Vec v;
    for (int i = 0; i < kWidth; ++i) {
        v[i] = to_float(x[i]);
    }
    return v;
#endif
}

namespace simd_detail {

template <int... I>
Vec add_pairs(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

}  // namespace simd_detail

// Element i of the result is the sum over x[i]; x is used up.
inline Vec sum_each(Vec (&x)[kWidth]) {
#pragma GCC unroll 16
    for (int n = kWidth / 2; n > 0; n /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
            x[i] = simd_detail::add_pairs(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kWidth>());
        }
    }
    return x[0];
}

}  // namespace fastkernels::cpu::FK_ISA
