// A row of floats to bytes with scales (common/byte_scales.h). Included by kernel files only.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "common/byte_scales.h"
#include "common/cpu/isa.h"

namespace fastkernels::cpu::FK_ISA {

// To nearest, ties to even; at most 448; NaN stays NaN.
inline uint8_t to_e4m3(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    // Below 2^-6 in units of 2^-9: adding 2^14 leaves them, rounded, in the low bits.
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
    const uint32_t finite = magnitude < 0x3c800000u ? small : normal;
    const uint32_t byte = magnitude > 0x7f800000u ? 0x7fu : magnitude >= 0x43e00000u ? 0x7eu : finite;
    return static_cast<uint8_t>(byte | (bits >> 24 & 0x80u));
}

// The same; at most 57344.
inline uint8_t to_e5m2(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0xfffffu + ((magnitude >> 21) & 1u)) >> 21) - (112u << 2);
    // Below 2^-14 in units of 2^-16
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p7f) - 0x43000000u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t byte = magnitude > 0x7f800000u ? 0x7fu : magnitude >= 0x47600000u ? 0x7bu : finite;
    return static_cast<uint8_t>(byte | (bits >> 24 & 0x80u));
}

inline uint8_t to_int8(float x) {
    const float rounded = std::nearbyint(x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x);
    return static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(x == x ? rounded : 0.0f)));
}

inline void quantize_stretch(const float* x, uint8_t* out, int64_t size, ByteType type, float scale) {
    const float inverse = 1.0f / scale;
    if (type == ByteType::e4m3) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = to_e4m3(x[i] * inverse);
        }
    } else if (type == ByteType::e5m2) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = to_e5m2(x[i] * inverse);
        }
    } else {
        for (int64_t i = 0; i < size; ++i) {
            out[i] = to_int8(x[i] * inverse);
        }
    }
}

inline float scale_of(const float* x, int64_t size, ByteType type) {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) {
        const float magnitude = std::fabs(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return std::max(largest / largest_byte(type), kLeastScale);
}

// A row's scale and zero point: byte = x / scale + zero. Both are NaN-proof: scale is NaN where the row holds NaN or
// infinity, and zero in range.
struct ScaleAndZero {
    float scale;
    int32_t zero;

    uint8_t byte(float x) const {
        return to_byte_range(std::nearbyint(x * (1.0f / scale)) + static_cast<float>(zero));
    }
    static int8_t to_byte_range(float x) {
        const float inside = x > kMostWithZero ? kMostWithZero : x > -kMostWithZero ? x : -kMostWithZero;
        return static_cast<int8_t>(static_cast<int>(inside));
    }
};

inline ScaleAndZero scale_and_zero_of(const float* x, int64_t size) {
    float least = 0.0f, largest = 0.0f, bad = 0.0f;
#pragma omp simd reduction(min : least) reduction(max : largest) reduction(+ : bad)
    for (int64_t i = 0; i < size; ++i) {
        least = x[i] < least ? x[i] : least;
        largest = x[i] > largest ? x[i] : largest;
        bad += x[i] * 0.0f;
    }
    constexpr float kSteps = 2.0f * kMostWithZero;
    const float scale = std::max(largest / kSteps - least / kSteps, kLeastScale) + bad;
    const float zero = -kMostWithZero - std::nearbyint(least * (1.0f / scale));
    return {scale, ScaleAndZero::to_byte_range(zero)};
}

// x: the row of `token`
inline void quantize_row(const float* x, uint8_t* out, int64_t size, int64_t token, const ByteScales& bytes) {
    if (bytes.kind == ScaleKind::tensor) {
        quantize_stretch(x, out, size, bytes.type, *bytes.scales);
        return;
    }
    const int64_t stretch = bytes.kind == ScaleKind::token ? size : kScaleBlock;
    for (int64_t at = 0; at < size; at += stretch) {
        const float scale = scale_of(x + at, stretch, bytes.type);
        bytes.scales[(token * size + at) / stretch] = scale;
        quantize_stretch(x + at, out + at, stretch, bytes.type, scale);
    }
}

}  // namespace fastkernels::cpu::FK_ISA
