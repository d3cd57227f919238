// 8-bit values with scales: value = byte * scale. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

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

struct QuantizeParams {
    const void* x;  // [num_tokens, size], last dimension contiguous
    void* out;      // [num_tokens, size] bytes, last dimension contiguous
    ByteScales bytes;
    int64_t num_tokens, size;
    int64_t x_token_stride, out_token_stride;  // elements
    DType dtype;                               // of x
};

void quantize_cuda(const QuantizeParams& p, void* stream);
void quantize_cpu(const QuantizeParams& p);

}  // namespace fastkernels
