// One token's product with a weight of bytes, and what stands before and behind it in a decode step.
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

}  // namespace fastkernels
