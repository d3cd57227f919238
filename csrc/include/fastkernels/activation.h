// Gated activations: out = f(gate) * up, of a merged gate and up projection. Pointers are the GPU's for *_cuda, the
// CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/byte_scales.h"
#include "common/dtype.h"

namespace fastkernels {

struct GatedParams {
    const void* x;  // [num_tokens, 2 * size]: the gate, then up; last dimension contiguous
    void* out;      // [num_tokens, size], last dimension contiguous; bytes of the *_quant ops
    int64_t num_tokens, size;
    int64_t x_token_stride, out_token_stride;  // elements
    bool approximate_tanh;                     // gelu_mul only: the tanh formula instead of the error function
    DType dtype;
    ByteScales bytes;  // *_quant only
};

void silu_mul_cuda(const GatedParams& p, void* stream);
void silu_mul_cpu(const GatedParams& p);

void gelu_mul_cuda(const GatedParams& p, void* stream);
void gelu_mul_cpu(const GatedParams& p);

// What the op without _quant computes, in fp32 and not rounded to dtype, as bytes and scales.
void silu_mul_quant_cuda(const GatedParams& p, void* stream);
void silu_mul_quant_cpu(const GatedParams& p);

void gelu_mul_quant_cuda(const GatedParams& p, void* stream);
void gelu_mul_quant_cpu(const GatedParams& p);

}  // namespace fastkernels
