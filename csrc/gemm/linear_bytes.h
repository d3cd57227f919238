// linear's kernel for products of bytes with scales: a tactic of matmul for few tokens.
#pragma once

#include "fastkernels/gemm.h"

namespace fastkernels {

inline constexpr int64_t kLinearBytesMaxTokens = 8;

constexpr bool fits_linear_bytes(const MatmulParams& p) {
    return p.num_tokens <= kLinearBytesMaxTokens && p.in_size % 16 == 0 && p.scales != MatmulScales::none &&
           is_plain(p);
}

void linear_bytes(const MatmulParams& p, void* stream);

}  // namespace fastkernels
