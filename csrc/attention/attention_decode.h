// What the launcher of attention hands to the decode kernel, one instantiation file a head size.
#pragma once

#include <vector_types.h>

#include "attention/attention_mma.h"

namespace fastkernels {

// kRowTiles: packed rows of a tile in units of 16, 1 or 2.
template <typename KV, int D, int kRowTiles>
void attention_decode(const AttentionMmaArgs& a, dim3 grid, void* stream);

// The prefill tiles of a call by the same kernel, 16 * kRowTiles rows at a time: where attention_mma and attention_sm90
// have no instance for the keys or the mask.
template <typename KV, int D, int kRowTiles>
void attention_rows(const AttentionMmaArgs& a, dim3 grid, void* stream);

}  // namespace fastkernels
