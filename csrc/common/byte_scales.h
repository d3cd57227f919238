// 8-bit values with scales: value = byte * scale.
#pragma once

#include <cstdint>

namespace fastkernels {

enum class ByteType : int8_t { e4m3, int8 };

// What shares a scale. tensor: all elements; the scale is given. token: a row, block: kScaleBlock neighbours of a row;
// the scale is computed: the largest magnitude / the type's largest value (448, 127), at least kLeastScale.
enum class ScaleKind : int8_t { tensor, token, block };

inline constexpr int kScaleBlock = 128;
inline constexpr float kLeastScale = 0x1p-126f;

constexpr float largest_byte(ByteType type) {
    return type == ByteType::e4m3 ? 448.0f : 127.0f;
}

struct ByteScales {
    float* scales;  // tensor: [1], read; token: [num_tokens], block: [num_tokens, size / kScaleBlock], written
    ByteType type;
    ScaleKind kind;
};

}  // namespace fastkernels
