// Activations as whole numbers, so that products with weights of 8 or 4 bits are sums of products of bytes, exact
// whatever their order.
//
// 128 neighbours of a token share a scale s. With kDigits digits d of base 254, each in -127 .. 127,
//     x = s * (d[0] * 254^(kDigits - 1) + ... + d[kDigits - 1]),
// to within s / 2: 2 digits hold 1/64,760 of the largest neighbour, less than bf16 and fp16 lose in rounding the
// result; 3 digits hold fp32's 24 bits. One digit is int8 as `quantize` makes it per token, or as
// `quantize_zeros` does: what the zero point adds is left to the caller.
//
// A unit is 2 registers' bytes of a token. The weights of a register of 4 bits a weight are the even elements of a
// unit in their low halves and the odd ones in their high halves, and the digits lie in that order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/cpu/bytes.h"
#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"

namespace fastkernels::cpu::FK_ISA {

inline constexpr int kUnit = 2 * kBytes;  // elements
inline constexpr int kBlock = 128;        // elements that share a scale; a multiple of kUnit
inline constexpr float kBase = 254.0f;

struct Digits {
    int64_t num_units, num_sums;
    std::vector<int8_t> bytes;            // [num_tokens][num_units][kDigits][kUnit]
    std::vector<int32_t> offsets;         // [num_tokens][num_units][num_offsets<kDigits>][kWidth], see digits_of_token
    std::vector<uint32_t> token_offsets;  // [num_tokens], of one digit; sums of int32 may pass their range on the way
    std::vector<float> scales;            // [num_tokens][num_units]
    std::vector<int32_t> zeros;           // [num_tokens], of one digit with a zero point
    std::vector<float> sums;  // [num_tokens][num_sums]: x added up over the stretches that share a weight's scale
};

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_small(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
    return (x + kRound) - kRound;
}

template <int kDigits>
inline void digits_of(const float (&x)[kBlock], float inverse, int8_t (&out)[kDigits][kBlock]) {
    const auto store = [](float digit) { return static_cast<int8_t>(static_cast<int32_t>(digit)); };
    if constexpr (kDigits == 1) {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
            out[0][i] = static_cast<int8_t>(to_int8(x[i] * inverse));  // bit for bit what `quantize` gives
        }
    } else {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
            float rest = x[i] * inverse;
            if constexpr (kDigits == 3) {
                const float first = round_small(rest * (1.0f / (kBase * kBase)));
                out[0][i] = store(first);
                rest -= first * (kBase * kBase);
            }
            const float digit = round_small(rest * (1.0f / kBase));
            out[kDigits - 2][i] = store(digit);
            out[kDigits - 1][i] = store(round_small(rest - digit * kBase));
        }
    }
}

// The largest number of kDigits digits, less what rounding could add.
template <int kDigits>
inline constexpr float kLargest = kDigits == 1   ? 127.0f
                                  : kDigits == 2 ? 32380.0f
                                                 : 8225700.0f;

// Weights are unsigned, `zero` more than they are; sums begin with -zero times the digits they are made of. One digit:
// a sum a token. More: sums a lane and unit for all digits but the first, whose own goes with the second's.
template <int kDigits>
inline constexpr int num_offsets = kDigits - 1;

// kPacked: the order of 4-bit weights.
template <int kDigits, bool kPacked, bool kZeros, typename T>
void digits_of_token(const T* x, int64_t size, int zero, int64_t token, int64_t sum_size, Digits& to) {
    static_assert(!kZeros || kDigits == 1);
    int8_t* bytes = to.bytes.data() + token * to.num_units * kDigits * kUnit;
    int32_t* offsets = to.offsets.data() + token * to.num_units * num_offsets<kDigits> * kWidth;
    float* scales = to.scales.data() + token * to.num_units;
    std::vector<float> row;
    float token_inverse = 0.0f, token_scale = 0.0f;
    ScaleAndZero by{};
    if constexpr (kDigits == 1) {
        row.resize(size);
        float bad = 0.0f;
#pragma omp simd reduction(+ : bad)
        for (int64_t i = 0; i < size; ++i) {
            row[i] = to_float(x[i]);
            bad += row[i] * 0.0f;
        }
        if constexpr (kZeros) {
            by = scale_and_zero_of(row.data(), size);
            token_scale = by.scale;
            to.zeros[token] = by.zero;
        } else {
            token_scale = scale_of(row.data(), size, ByteType::int8) + bad;
            token_inverse = 1.0f / token_scale;
        }
    }
    for (int64_t begin = 0; begin < size; begin += kBlock) {
        float values[kBlock];
        const int count = static_cast<int>(std::min<int64_t>(kBlock, size - begin));
        float largest = 0.0f, bad = 0.0f;  // 0 x NaN and 0 x infinity are NaN
#pragma omp simd reduction(max : largest) reduction(+ : bad)
        for (int i = 0; i < count; ++i) {
            values[i] = to_float(x[begin + i]);
            const float magnitude = std::fabs(values[i]);
            largest = magnitude > largest ? magnitude : largest;
            bad += values[i] * 0.0f;
        }
        std::fill(values + count, values + kBlock, 0.0f);
        float scale = token_scale, inverse = token_inverse;
        if constexpr (kDigits > 1) {
            scale = std::max(largest / kLargest<kDigits>, kLeastScale) + bad;
            inverse = 1.0f / scale;
        }
        int8_t digits[kDigits][kBlock];
        if constexpr (kZeros) {
            for (int i = 0; i < kBlock; ++i) {
                digits[0][i] = i < count ? static_cast<int8_t>(by.byte(values[i])) : int8_t{0};
            }
        } else {
            digits_of<kDigits>(values, inverse, digits);
        }
        for (int from = 0; from < count; from += kUnit) {
            *scales++ = scale;
            int32_t sums[kDigits][kWidth];
            for (int d = 0; d < kDigits; ++d) {
                const int8_t* natural = digits[d] + from;
                for (int i = 0; i < kBytes; ++i) {
                    bytes[i] = kPacked ? natural[2 * i] : natural[i];
                    bytes[kBytes + i] = kPacked ? natural[2 * i + 1] : natural[kBytes + i];
                }
                for (int lane = 0; lane < kWidth; ++lane) {
                    int32_t total = 0;
                    for (int i = 4 * lane; i < 4 * lane + 4; ++i) {
                        total += bytes[i] + bytes[kBytes + i];
                    }
                    sums[d][lane] = -zero * total;
                }
                bytes += kUnit;
            }
            for (int d = 1; d < kDigits; ++d) {
                for (int lane = 0; lane < kWidth; ++lane) {
                    *offsets++ = sums[d][lane] + (d == 1 ? static_cast<int32_t>(kBase) * sums[0][lane] : 0);
                }
            }
            if constexpr (kDigits == 1) {
                for (int lane = 0; lane < kWidth; ++lane) {
                    to.token_offsets[token] += static_cast<uint32_t>(sums[0][lane]);
                }
            }
        }
    }
    for (int64_t i = 0; i < to.num_sums; ++i) {
        float total = 0.0f;
        const int64_t end = std::min(size, (i + 1) * sum_size);
#pragma omp simd reduction(+ : total)
        for (int64_t k = i * sum_size; k < end; ++k) {
            total += to_float(x[k]);
        }
        to.sums[token * to.num_sums + i] = total;
    }
}

// num_sums: stretches of sum_size elements whose sums are wanted, 0 where none are
template <int kDigits, bool kPacked, bool kZeros, typename T>
void make_digits(const T* x, int64_t token_stride, int64_t num_tokens, int64_t size, int zero, int64_t num_sums,
                 int64_t sum_size, Digits& to) {
    to.num_units = (size + kUnit - 1) / kUnit;
    to.num_sums = num_sums;
    to.bytes.resize(num_tokens * to.num_units * kDigits * kUnit);
    to.offsets.resize(num_tokens * to.num_units * num_offsets<kDigits> * kWidth);
    to.token_offsets.assign(kDigits == 1 ? num_tokens : 0, 0);
    to.scales.resize(num_tokens * to.num_units);
    to.zeros.resize(kZeros ? num_tokens : 0);
    to.sums.resize(num_tokens * num_sums);
    parallel_for(num_tokens, 1 + 16384 / (size + 1), [&](int64_t token) {
        digits_of_token<kDigits, kPacked, kZeros>(x + token * token_stride, size, zero, token, sum_size, to);
    });
}

}  // namespace fastkernels::cpu::FK_ISA
