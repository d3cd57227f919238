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

}  // namespace fastkernels
