// 8-bit values with scales: value = byte * scale.
#pragma once

#include <cstdint>

namespace fastkernels {

enum class ByteType : int8_t { e4m3, int8, e5m2 };

// What shares a scale. tensor: all elements; the scale is given. token: a row, block: kScaleBlock neighbours of a row;
// the scale is computed: the largest magnitude / the type's largest value (448, 127, 57344), at least kLeastScale.
enum class ScaleKind : int8_t { tensor, token, block };

inline constexpr int kScaleBlock = 128;
inline constexpr float kLeastScale = 0x1p-126f;

constexpr float largest_byte(ByteType type) {
    return type == ByteType::e4m3 ? 448.0f : type == ByteType::e5m2 ? 57344.0f : 127.0f;
}

// With a zero point a row's bytes, int8, are -kMostWithZero to kMostWithZero for its least to its largest value, or 0:
// as the negative of a byte is one, so is that of a zero point, which is what 0 becomes.
inline constexpr float kMostWithZero = 127.0f;

struct ByteScales {
    float* scales;  // tensor: [1], read; token: [num_tokens], block: [num_tokens, size / kScaleBlock], written
    ByteType type;
    ScaleKind kind;
};

}  // namespace fastkernels
