// What matmul hands to the instances of its kernel for any GPU, a file a type.
#pragma once

#include "fastkernels/gemm.h"

namespace fastkernels {

// Tiles of so many tokens and as many rows of the weight; a tactic each.
inline constexpr int kMatmulSm80Tiles[] = {128, 64};
inline constexpr int kNumMatmulSm80Tiles = sizeof(kMatmulSm80Tiles) / sizeof(kMatmulSm80Tiles[0]);

// T: of x
template <typename T, MatmulScales kScales>
void matmul_sm80_tile(const MatmulParams& p, int size, void* stream);

}  // namespace fastkernels
