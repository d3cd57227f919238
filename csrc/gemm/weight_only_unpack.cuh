// Weights of 4 and 8 bits to pairs of bf16 or fp16 in registers: masks, shifts and one exact operation of two halves.
// A word holds what one lane needs next, in the order that weight_only.h describes, so that no lane asks another.
//
// The integers lean on a mantissa: with 0x4300 or'ed to it, a number below 128 in the low bits is the bf16 of 128 plus
// that number, and with 0x6400 one below 1024 the fp16 of 1024 plus it. The floats are cut into the place of sign,
// exponent and mantissa; what that leaves out of the exponent's offset is a power of two, multiplied in at once or, as
// kLeftOut, into the row's sum. On the CPU the same functions run in the test of the layout.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.cuh"
#include "common/ptx/lop3.cuh"

namespace fastkernels {

#define FK_HOST_DEVICE __host__ __device__ __forceinline__

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;

template <typename T>
FK_HOST_DEVICE PairOf<T> as_pair(uint32_t bits) {
    PairOf<T> pair;
    memcpy(&pair, &bits, 4);
    return pair;
}

template <typename Pair>
FK_HOST_DEVICE uint32_t bits_of(Pair pair) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

template <typename T>
FK_HOST_DEVICE uint32_t subtract_pair(uint32_t x, uint32_t y) {
    return bits_of(__hsub2(as_pair<T>(x), as_pair<T>(y)));
}

template <typename T>
FK_HOST_DEVICE uint32_t multiply_pair(uint32_t x, uint32_t y) {
    return bits_of(__hmul2(as_pair<T>(x), as_pair<T>(y)));
}

// Bytes of x (0 to 3) and y (4 to 7), by the selector's nibbles from the lowest.
FK_HOST_DEVICE uint32_t pick_bytes(uint32_t x, uint32_t y, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(x, y, selector);
#else
    const uint64_t both = x | static_cast<uint64_t>(y) << 32;
    uint32_t z = 0;
    for (int i = 0; i < 4; ++i) {
        z |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return z;
#endif
}

template <typename T>
inline constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

// --- int4 ------------------------------------------------------------------------------------------------------------

// What to subtract for the zero point 8, and for those of a lane's two rows (two bytes).
template <typename T>
inline constexpr uint32_t kEight = kIsBf16<T> ? 0x43084308u : 0x64086408u;

template <typename T, int kRow>
FK_HOST_DEVICE uint32_t int4_zero(uint32_t zeros) {
    return pick_bytes(zeros, kIsBf16<T> ? 0x43u : 0x64u, kRow == 0 ? 0x4040 : 0x4141);
}

// a: one operand of the mma, rows g, g + 8, g, g + 8; zero: of the two rows.
template <typename T>
FK_HOST_DEVICE void unpack_int4(uint32_t word, const uint32_t (&zero)[2], uint32_t (&a)[4]) {
    constexpr uint32_t kLean = kIsBf16<T> ? 0x43004300u : 0x64006400u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = subtract_pair<T>(and_or(word >> 4 * i, 0x000f000fu, kLean), zero[i % 2]);
    }
}

// --- int8 ------------------------------------------------------------------------------------------------------------

// Two rows' pairs from one word: bytes row 0 low, row 1 low, row 0 high, row 1 high.
template <typename T>
FK_HOST_DEVICE void unpack_int8(uint32_t word, uint32_t& first, uint32_t& second) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t w = word >> 8 * i;
        uint32_t& pair = i == 0 ? first : second;
        if constexpr (kIsBf16<T>) {  // 128 + the low 7 bits, less 128 or, where the sign bit doubles it, 256
            pair = subtract_pair<T>(and_or(w, 0x007f007fu, 0x43004300u), and_or(w, 0x00800080u, 0x43004300u));
        } else {  // 1024 + 128 + the byte
            pair = subtract_pair<T>((w & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
        }
    }
}

// --- e4m3 ------------------------------------------------------------------------------------------------------------

// fp16: 2^-8 times the value. bf16: the value. NaN is read as 480.
template <typename T>
inline constexpr float kE4m3LeftOut = kIsBf16<T> ? 1.0f : 256.0f;

template <typename T>
FK_HOST_DEVICE void unpack_e4m3(uint32_t word, uint32_t& first, uint32_t& second) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t w = i == 0 ? word << 8 : word;  // the pair is in the upper byte of each half
        uint32_t& pair = i == 0 ? first : second;
        pair = and_or(w, 0x80008000u, (w & 0x7f007f00u) >> (kIsBf16<T> ? 4 : 1));
        if constexpr (kIsBf16<T>) {
            pair = multiply_pair<T>(pair, 0x7b807b80u);  // 2^120
        }
    }
}

// --- e2m1 ------------------------------------------------------------------------------------------------------------

template <typename T>
inline constexpr float kE2m1LeftOut = kIsBf16<T> ? 256.0f : 128.0f;

// The codes of scales are relative to a factor of the row. NVFP4: 3 bits of mantissa below 5 of exponent, 80 is 1.
// MXFP4: an exponent, 245 is 1. Here they become pairs that multiply what unpack_e2m1 leaves without its offset.
template <typename T, int kBlock>
FK_HOST_DEVICE uint32_t e2m1_scale(uint32_t codes, int index) {
    const uint32_t selector = index == 0 ? 0x4040 : index == 1 ? 0x4141 : index == 2 ? 0x4242 : 0x4343;
    const uint32_t twice = pick_bytes(codes, 0, selector);  // in the low byte of each half
    if constexpr (kBlock == 16) {
        return kIsBf16<T> ? twice * 16 + 0x75807580u : twice * 128 + 0x30003000u;
    } else if constexpr (kIsBf16<T>) {
        return twice << 7;
    } else {  // blocks of less than 2^-21 of the row's largest are zero
        const int exponent = static_cast<int>(twice & 0xff) - 223;
        return static_cast<uint32_t>(exponent > 0 ? exponent : 0) * 0x04000400u;
    }
}

// Bits of a half: pair 0 sign 15, magnitude 8 to 6; pair 1 sign 12, magnitude 5 to 3; pair 2 sign 9, magnitude 2 to 0;
// pair 3 sign 14, magnitude 13, 11 and 10. scale: of the two rows.
template <typename T>
FK_HOST_DEVICE void unpack_e2m1(uint32_t word, const uint32_t (&scale)[2], uint32_t (&a)[4]) {
    uint32_t cut[4];
    cut[0] = word & 0x81c081c0u;
    cut[1] = word << 3 & 0x81c081c0u;
    cut[2] = word << 6 & 0x81c081c0u;
    cut[3] = and_or(word << 1, 0x80008000u, and_or(word >> 5, 0x01000100u, word >> 4 & 0x00c000c0u));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (!kIsBf16<T>) {
            cut[i] += (cut[i] & 0x01c001c0u) * 7;
        }
        a[i] = multiply_pair<T>(cut[i], scale[i % 2]);
    }
}

}  // namespace fastkernels
