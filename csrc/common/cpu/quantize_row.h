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
