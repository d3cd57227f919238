// One vector register of bytes and what products of bytes need: VNNI, AVX2, or the compiler's vector extension. A
// register of kBytes bytes goes with kWidth = kBytes / 4 sums (simd.h). Included by kernel files only.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/cpu/simd.h"

namespace fastkernels::cpu::FK_ISA {

inline constexpr int kBytes = 4 * kWidth;

using Bytes = uint8_t __attribute__((vector_size(kBytes)));
using Ints = int32_t __attribute__((vector_size(kBytes)));
using Words = uint32_t __attribute__((vector_size(kBytes)));

inline Bytes load_bytes(const void* x) {
    Bytes v;
    std::memcpy(&v, x, sizeof(v));
    return v;
}

inline Ints load(const int32_t* x) {
    Ints v;
    std::memcpy(&v, x, sizeof(v));
    return v;
}

inline Vec to_vec(Ints x) {
    return __builtin_convertvector(x, Vec);
}

// AVX2 has no product of unsigned and signed bytes that takes all of them: the sum of two passes int16. It takes
// weights up to 127 in magnitude by moving their sign to x; elsewhere 8-bit weights are given 128 more than they are.
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
inline constexpr bool kSignedBytes = false;
#else
inline constexpr bool kSignedBytes = true;
#endif

// Adds to element i of sum the products 4i .. 4i + 3 of weight, unsigned, and x, signed. AVX2: weight up to 128.
inline Ints dot(Ints sum, Bytes weight, Bytes x) {
#if defined(__AVX512VNNI__)
    return std::bit_cast<Ints>(
        _mm512_dpbusd_epi32(std::bit_cast<__m512i>(sum), std::bit_cast<__m512i>(weight), std::bit_cast<__m512i>(x)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(std::bit_cast<__m256i>(weight), std::bit_cast<__m256i>(x));
    return sum + std::bit_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    const Ints w = std::bit_cast<Ints>(weight), v = std::bit_cast<Ints>(x);
    sum += (w & 0xff) * (v << 24 >> 24);
    sum += (w >> 8 & 0xff) * (v << 16 >> 24);
    sum += (w >> 16 & 0xff) * (v << 8 >> 24);
    return sum + (w >> 24 & 0xff) * (v >> 24);
#endif
}

// The same of signed weights in -128 .. 127 and x in -127 .. 127, where kSignedBytes.
inline Ints dot_signed(Ints sum, Bytes weight, Bytes x) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    const __m256i w = std::bit_cast<__m256i>(weight);
    const __m256i moved = _mm256_sign_epi8(std::bit_cast<__m256i>(x), w);
    return dot(sum, std::bit_cast<Bytes>(_mm256_abs_epi8(w)), std::bit_cast<Bytes>(moved));
#else
    return dot(sum, weight, x);
#endif
}

// table[index[i]], of 16 entries.
inline Bytes look_up(const uint8_t (&table)[16], Bytes index) {
#if defined(__AVX512BW__)
    const __m128i once = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m512i entries = _mm512_maskz_broadcast_i32x4(0xffff, once);  // the plain form warns in gcc 12
    return std::bit_cast<Bytes>(_mm512_shuffle_epi8(entries, std::bit_cast<__m512i>(index)));
#elif defined(__AVX2__)
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return std::bit_cast<Bytes>(_mm256_shuffle_epi8(entries, std::bit_cast<__m256i>(index)));
#else
    for (int i = 0; i < kBytes; ++i) {
        index[i] = table[index[i]];
    }
    return index;
#endif
}

// All elements of a register added up, halves first.
template <typename V, int... I>
inline auto sum_halves(V x, std::integer_sequence<int, I...>) {
    constexpr int kHalf = sizeof...(I);
    if constexpr (kHalf == 1) {
        return x[0] + x[1];
    } else {
        return sum_halves(__builtin_shufflevector(x, x, I...) + __builtin_shufflevector(x, x, (kHalf + I)...),
                          std::make_integer_sequence<int, kHalf / 2>());
    }
}

template <typename V>
inline auto sum(V x) {
    return sum_halves(x, std::make_integer_sequence<int, kWidth / 2>());
}

}  // namespace fastkernels::cpu::FK_ISA
