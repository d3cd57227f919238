// Normalisations over the last dimension. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/byte_scales.h"
#include "common/dtype.h"

namespace fastkernels {

// x may be [num_tokens, num_heads, size] with free strides of the first two dimensions: a slice of a merged
// projection. A two-dimensional x has num_heads 1.
struct NormParams {
    const void* x;       // [num_tokens, num_heads, size], last dimension contiguous
    void* residual;      // like x; add_rms_norm only: x is added to it, and the sum is what is normalised
    const void* weight;  // [size], dtype of x
    const void* bias;    // [size], dtype of x; layer_norm only, may be null
    void* out;           // like x, may be x; bytes of the *_quant ops
    int64_t num_tokens;
    int64_t num_heads;
    int64_t size;
    int64_t x_token_stride, x_head_stride;  // elements
    int64_t residual_token_stride, residual_head_stride;
    int64_t out_token_stride, out_head_stride;
    float eps;
    DType dtype;
    ByteScales bytes;  // *_quant only, whose num_heads is 1
};

void rms_norm_cuda(const NormParams& p, void* stream);
void rms_norm_cpu(const NormParams& p);

void add_rms_norm_cuda(const NormParams& p, void* stream);
void add_rms_norm_cpu(const NormParams& p);

void layer_norm_cuda(const NormParams& p, void* stream);
void layer_norm_cpu(const NormParams& p);

// What the op without _quant computes, in fp32 and not rounded to dtype, as bytes and scales.
void rms_norm_quant_cuda(const NormParams& p, void* stream);
void rms_norm_quant_cpu(const NormParams& p);

void add_rms_norm_quant_cuda(const NormParams& p, void* stream);
void add_rms_norm_quant_cpu(const NormParams& p);

}  // namespace fastkernels
