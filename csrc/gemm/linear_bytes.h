// linear's kernel for products of bytes with scales: a tactic of matmul for few tokens.
#pragma once

#include "fastkernels/gemm.h"

namespace fastkernels {

// With scales of blocks there are registers for 8 tokens.
constexpr bool fits_linear_bytes(const MatmulParams& p) {
    return p.num_tokens <= (p.scales == MatmulScales::block ? 8 : kLinearMaxTokens) && p.in_size % 16 == 0 &&
           p.scales != MatmulScales::none;
}

void linear_bytes(const MatmulParams& p, void* stream);

}  // namespace fastkernels
