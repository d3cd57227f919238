// Matrix products with a weight. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// out = x weight^T + bias for a decode step's few tokens: a stream over the weight.
struct LinearParams {
    const void* x;       // [num_tokens, in_size], last dimension contiguous
    const void* weight;  // [out_size, in_size], last dimension contiguous
    const void* bias;    // [out_size], or null
    void* out;           // [num_tokens, out_size], last dimension contiguous
    int64_t num_tokens, in_size, out_size;
    int64_t x_token_stride, weight_row_stride, out_token_stride;  // elements
    bool constant_weight;  // no kernel before this one in its stream writes the weight: it may be read early
    DType dtype;
};

inline constexpr int64_t kLinearMaxTokens = 16;

void linear_cuda(const LinearParams& p, void* stream);
void linear_cpu(const LinearParams& p);

}  // namespace fastkernels
