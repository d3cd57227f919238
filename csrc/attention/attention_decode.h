// What the launcher of attention hands to the decode kernel, one instantiation file a head size.
#pragma once

#include <vector_types.h>

#include "attention/attention_mma.h"
#include "common/launch.h"

namespace fastkernels {

// Steps of at most 8 packed rows, as a rule of one sequence, run in blocks of 8 warps, one an SM: half as many parts to
// combine. The plan and the attention that uses it ask alike.
inline bool decodes_in_large_blocks(int64_t num_tokens, int group, int head_dim) {
    constexpr int kSharedBytes = 114 * 1024;
    return num_tokens * group <= 8 && head_dim <= 128 &&
           device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kSharedBytes;
}

// Items of a KV head that its splits then aim at, one block an SM.
inline int large_block_items(int num_kv_heads, int num_sms) {
    return num_sms > num_kv_heads ? num_sms / num_kv_heads : 1;
}

// Of at most so many tokens blocks bring their keys to the L2 before they wait, where an item has at most so many; with
// more the memory is busy anyway.
constexpr int64_t kPrefetchTokens = 4;
constexpr int kPrefetchKeys = 128;

// kTiles: packed rows of an item in units of 8, 1, 2 or 4. kWarps: of a block, 4, or 8 where the plan is for such.
template <typename KV, int D, int kTiles, int kWarps>
void attention_decode(const AttentionMmaArgs& a, dim3 grid, void* stream);

// The prefill tiles of a call by the same kernel, 8 * kTiles rows at a time: where attention_mma and attention_sm90
// have no instance for the keys or the mask.
template <typename KV, int D, int kTiles>
void attention_rows(const AttentionMmaArgs& a, dim3 grid, void* stream);

}  // namespace fastkernels
