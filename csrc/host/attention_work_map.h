// The layout of attention's work map and workspace, and their bounds. Shared by the plan kernel that writes the map,
// the attention kernels that read it, and attention_sizes; no CUDA.
//
// The queries of one KV head are packed: row r of a sequence is (token r / group, head r % group), where group =
// num_q_heads / num_kv_heads. A sequence of at most decode_rows rows is one decode tile, any other is cut into prefill
// tiles. A tile's keys, cut into blocks of kTileKeys, are given to one work item or split among several, whose partial
// results are then combined. Items of all KV heads are alike.
//
// There are two lists of items, since two kernels may run a step, the second beside the first:
//   decode items    the decode tiles, for attention_decode
//   prefill items   the prefill tiles, for attention_sm90 (attention/attention_sm90.h says when) or attention_mma
//
//   int32  [0], [1]                  number of decode items, of prefill items
//   int32  [2], [3]                  the next prefill item, 0 between launches; blocks that share them
//   int32  [kHeaderInts ...]         counters of split tiles and KV heads, 0 between launches: of decode items, then of
//                                    prefill items
//   WorkItem [item_offset]           decode items, room for max_items
//   WorkItem [prefill_item_offset]   prefill items, likewise
#pragma once

#include <cstdint>

namespace fastkernels {

struct alignas(16) WorkItem {
    int32_t seq;
    int32_t tile;         // row tile within the sequence
    int32_t split;        // this item's part of the tile's keys ...
    int32_t num_splits;   // ... of so many equal ones
    int32_t partial_row;  // of the tile, in the workspace; split s begins at partial_row + s * rows of the tile
    int32_t counter;      // index of the tile among the split ones
    int32_t q_begin, len_q;
    int32_t k_begin, len_k;  // k_begin: contiguous only
    int32_t unused[2];
};
static_assert(sizeof(WorkItem) == 48);

constexpr int kTileKeys = 64;
constexpr int kMinSplitTiles = 4;       // 256 keys: below, the combination costs more than the split gains,
constexpr int kMinSplitTilesOfFew = 2;  // unless there are fewer tokens than kFewTokens and the GPU is idle
constexpr int kFewTokens = 4;
constexpr int kMinPrefillSplitTiles = 32;  // of attention_sm90, whose partial results are 8 times as large
constexpr int kBlocksPerSm = 2;            // of attention_mma
constexpr int kDecodeBlocksPerSm = 2;
constexpr int kMaxDecodeSplits = 128;
constexpr int kHeaderInts = 4;
constexpr int kItemInts = sizeof(WorkItem) / sizeof(int32_t);
constexpr int kPartialExtra = 4;  // floats of a partial row past its head_dim: max, sum, and two for alignment
constexpr int kMaxCombinedRows = 1024;

// Rows of a decode tile; two m16 tiles where the heads of one token take them.
constexpr int decode_rows(int head_dim, int group) {
    return group > 16 && group <= 32 && head_dim <= 128 ? 32 : 16;
}

// Rows of a prefill tile of attention_mma.
constexpr int prefill_rows(int head_dim) {
    return head_dim <= 128 ? 128 : 64;
}

// Rows of a prefill tile of attention_sm90, 64 for each of its consumer warpgroups; whole tokens, so that a tile of
// queries is one box of [tokens, heads of the group].
constexpr int prefill_rows_sm90(int head_dim, int group) {
    const int rows = head_dim <= 64 ? 192 : 128;
    return rows / group * group;
}

// Splits aim at one wave: this many items for each KV head.
constexpr int64_t target_items(int num_kv_heads, int num_sms) {
    return (static_cast<int64_t>(kBlocksPerSm) * num_sms + num_kv_heads - 1) / num_kv_heads;
}

// Splits of decode tiles aim at one wave of attention_decode, which at worst leaves less idle than more splits cost.
constexpr int64_t decode_target_items(int num_kv_heads, int num_sms) {
    const int64_t items = static_cast<int64_t>(kDecodeBlocksPerSm) * num_sms / num_kv_heads;
    return items > 1 ? items : 1;
}

// A block combines rows * num_splits <= kMaxCombinedRows partial rows, or 8 splits of more rows.
constexpr int max_splits(int rows) {
    return kMaxCombinedRows / rows > 8 ? kMaxCombinedRows / rows : 8;
}

constexpr int64_t most_seqs(int64_t num_tokens, int64_t num_seqs) {
    return num_seqs < num_tokens ? num_seqs : num_tokens;
}

// With splits of at least c blocks of keys, where c * target >= all blocks of all tiles of a list: a tile of n blocks
// makes ceil(n / c) <= n / c + 1 items, so all tiles together make at most target more than one each ...
constexpr int64_t max_decode_items(int64_t num_tokens, int64_t num_seqs, int num_kv_heads, int num_sms) {
    return most_seqs(num_tokens, num_seqs) + decode_target_items(num_kv_heads, num_sms);
}

// A sequence that is cut into prefill tiles has more than 16 rows, and no tile but its last has fewer than 64,
// whichever kernel runs it.
constexpr int64_t max_prefill_items(int64_t num_tokens, int64_t num_seqs, int group, int num_kv_heads, int num_sms) {
    const int64_t rows = num_tokens * group, seqs = most_seqs(num_tokens, num_seqs);
    return (seqs < rows / 17 ? seqs : rows / 17) + rows / 64 + target_items(num_kv_heads, num_sms);
}

// ... and those that are split (n > c, so n / c + 1 < 2 * n / c) at most twice the target, of so many rows each.
constexpr int64_t max_split_rows(int64_t num_tokens, int group, int tile_rows, int64_t target) {
    const int64_t rows = num_tokens * group;
    return (rows < tile_rows ? rows : tile_rows) * 2 * target;
}

// The partial results of prefill items lie behind those of decode tiles.
constexpr int64_t first_prefill_partial_row(int64_t num_tokens, int group, int head_dim, int num_kv_heads,
                                            int num_sms) {
    return max_split_rows(num_tokens, group, decode_rows(head_dim, group), decode_target_items(num_kv_heads, num_sms));
}

constexpr int64_t num_counters(int num_kv_heads, int num_sms) {
    return (decode_target_items(num_kv_heads, num_sms) + target_items(num_kv_heads, num_sms)) * num_kv_heads;
}

constexpr int64_t work_map_item_offset(int num_kv_heads, int num_sms) {
    return kHeaderInts + (num_counters(num_kv_heads, num_sms) + 3) / 4 * 4;
}

constexpr int64_t work_map_prefill_item_offset(int64_t num_tokens, int64_t num_seqs, int num_kv_heads, int num_sms) {
    return work_map_item_offset(num_kv_heads, num_sms) +
           max_decode_items(num_tokens, num_seqs, num_kv_heads, num_sms) * kItemInts;
}

}  // namespace fastkernels
