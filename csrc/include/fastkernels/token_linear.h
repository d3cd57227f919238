// One token's product with a weight of bytes, or of 4 or 8 bits with x as it is, and what stands before and behind it
// in a decode step.
#pragma once

#include "fastkernels/gemm.h"

namespace fastkernels {

// What is multiplied: x / sqrt(mean(x^2) + eps) * weight, rounded to bytes with a scale; x has the type of out.
struct TokenNorm {
    const void* weight = nullptr;  // [in_size], of x's type; null: x is bytes, as MatmulParams says
    float eps = 0.0f;
};

// Of a row that is normalised: what a block keeps of it in registers.
inline constexpr int64_t kTokenLinearMaxSize = 8192;

// p: of one token, e4m3 or int8 with a scale a row; tactic, workspace and zero points are not read. adds: out += the
// product, which is rounded before.
void token_linear_cuda(const MatmulParams& p, const TokenNorm& norm, bool adds, void* stream);

struct TokenSides {
    TokenNorm norm;      // what is multiplied is rounded to x's type; weight null: x as it is
    bool adds = false;   // out += the product, which is rounded before
    bool gated = false;  // out = silu(gate) * up; the weight has out_size rows of the gate, then as many of up
};

// p: of one token, and not of a format for x in e4m3; out_size is that of out, gated a multiple of 16; tactic: 0, or
// one for few tokens.
void token_weight_only_linear_cuda(const WeightOnlyParams& p, const TokenSides& sides, void* stream);

}  // namespace fastkernels
