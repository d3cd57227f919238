// linear's kernel for products of bytes with scales: a tactic of matmul for few tokens.
#pragma once

#include "fastkernels/gemm.h"

namespace fastkernels {

// With scales of blocks there are registers for 8 tokens; e5m2 has one instance.
constexpr bool fits_linear_bytes(const MatmulParams& p) {
    const bool only_8 = p.scales == MatmulScales::block || p.dtype == DType::e5m2;
    return p.num_tokens <= (only_8 ? 8 : kLinearMaxTokens) && p.in_size % 16 == 0 && p.scales != MatmulScales::none;
}

void linear_bytes(const MatmulParams& p, void* stream);

}  // namespace fastkernels
