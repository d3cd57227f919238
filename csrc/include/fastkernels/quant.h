// Plain quantisation: 8-bit values with scales, of a tensor. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/byte_scales.h"
#include "common/dtype.h"

namespace fastkernels {

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

// A scale and a zero point a token: scale is the way from the least to the largest value, 0 among them, / 254, at least
// kLeastScale, NaN where one is not finite; out = x * (1 / scale), rounded to nearest and even, + zero.
struct QuantizeZerosParams {
    const void* x;   // [num_tokens, size], last dimension contiguous
    int8_t* out;     // [num_tokens, size], last dimension contiguous: -127 to 127
    float* scales;   // [num_tokens]
    int32_t* zeros;  // [num_tokens]: -127 to 127
    int64_t num_tokens, size;
    int64_t x_token_stride, out_token_stride;  // elements
    DType dtype;                               // of x
};

void quantize_zeros_cuda(const QuantizeZerosParams& p, void* stream);
void quantize_zeros_cpu(const QuantizeZerosParams& p);

}  // namespace fastkernels
