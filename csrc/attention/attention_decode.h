// What the launcher of attention hands to the decode kernel, one instantiation file a head size.
#pragma once

#include <vector_types.h>

#include "attention/attention_mma.h"

namespace fastkernels {

// Of at most so many tokens blocks bring their keys to the L2 before they wait; with more the memory is busy anyway.
constexpr int64_t kPrefetchTokens = 4;

// kTiles: packed rows of an item in units of 8, 1, 2 or 4.
template <typename KV, int D, int kTiles>
void attention_decode(const AttentionMmaArgs& a, dim3 grid, void* stream);

// The prefill tiles of a call by the same kernel, 8 * kTiles rows at a time: where attention_mma and attention_sm90
// have no instance for the keys or the mask.
template <typename KV, int D, int kTiles>
void attention_rows(const AttentionMmaArgs& a, dim3 grid, void* stream);

}  // namespace fastkernels
