// Normalisations over the last dimension. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// x may be [num_tokens, num_heads, size] with free strides of the first two dimensions: a slice of a merged
// projection. A two-dimensional x has num_heads 1.
struct RmsNormParams {
    const void* x;       // [num_tokens, num_heads, size], last dimension contiguous
    const void* weight;  // [size], dtype of x
    void* out;           // like x; may be x
    int64_t num_tokens;
    int64_t num_heads;
    int64_t size;
    int64_t x_token_stride, x_head_stride;  // elements
    int64_t out_token_stride, out_head_stride;
    float eps;
    DType dtype;
};

void rms_norm_cuda(const RmsNormParams& p, void* stream);
void rms_norm_cpu(const RmsNormParams& p);

}  // namespace fastkernels
