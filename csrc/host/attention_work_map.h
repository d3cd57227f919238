// The layout of attention's work map and workspace, and their bounds. Shared by the plan kernel that writes the map,
// the attention kernels that read it, and attention_sizes; no CUDA.
//
// The queries of one KV head are packed: row r of a sequence is (token r / group, head r % group), where group =
// num_q_heads / num_kv_heads. A sequence of at most kDecodeRows rows is one decode tile, any other is cut into prefill
// tiles. A tile's keys, cut into blocks of kTileKeys, are given to one work item or split among several, whose partial
// results are then combined. Items of all KV heads are alike.
//
// There are two lists of items, since two kernels may run a step, the second beside the first:
//   decode items    the decode tiles; where the GPU has no prefill kernel of its own, the prefill tiles too
//   prefill items   the prefill tiles of attention_sm90 (attention/attention_sm90.h says when it runs)
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
constexpr int kDecodeRows = 16;
constexpr int kMinSplitTiles = 4;          // 256 keys: below, the combination costs more than the split gains
constexpr int kMinPrefillSplitTiles = 32;  // of prefill items, whose partial results are 8 times as large
constexpr int kBlocksPerSm = 2;
constexpr int kHeaderInts = 4;
constexpr int kItemInts = sizeof(WorkItem) / sizeof(int32_t);
constexpr int kPartialExtra = 4;  // floats of a partial row past its head_dim: max, sum, and two for alignment
constexpr int kMaxCombinedRows = 1024;

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

// A block combines rows * num_splits <= kMaxCombinedRows partial rows, or 8 splits of more rows.
constexpr int max_splits(int rows) {
    return kMaxCombinedRows / rows > 8 ? kMaxCombinedRows / rows : 8;
}

// 64: no tile but a sequence's last has fewer rows, whichever kernel runs it.
constexpr int64_t max_tiles(int64_t num_tokens, int64_t num_seqs, int group) {
    const int64_t most_seqs = num_seqs < num_tokens ? num_seqs : num_tokens;
    return most_seqs + num_tokens * group / 64;
}

// With splits of at least c blocks of keys, where c * target_items >= all blocks of all tiles: a tile of n blocks
// makes ceil(n / c) <= n / c + 1 items, so all tiles together make at most target_items more than one each ...
constexpr int64_t max_items(int64_t num_tokens, int64_t num_seqs, int group, int num_kv_heads, int num_sms) {
    return max_tiles(num_tokens, num_seqs, group) + target_items(num_kv_heads, num_sms);
}

// ... and those that are split (n > c, so n / c + 1 < 2 * n / c) at most twice target_items, of so many rows each.
constexpr int64_t max_split_rows(int64_t num_tokens, int group, int tile_rows, int num_kv_heads, int num_sms) {
    const int64_t rows = num_tokens * group;
    return (rows < tile_rows ? rows : tile_rows) * 2 * target_items(num_kv_heads, num_sms);
}

// The partial results of prefill items lie behind those of decode tiles.
constexpr int64_t first_prefill_partial_row(int64_t num_tokens, int group, int num_kv_heads, int num_sms) {
    return max_split_rows(num_tokens, group, kDecodeRows, num_kv_heads, num_sms);
}

constexpr int64_t num_counters(int num_kv_heads, int num_sms) {
    return 2 * target_items(num_kv_heads, num_sms) * num_kv_heads;
}

constexpr int64_t work_map_item_offset(int num_kv_heads, int num_sms) {
    return kHeaderInts + (num_counters(num_kv_heads, num_sms) + 3) / 4 * 4;
}

constexpr int64_t work_map_prefill_item_offset(int64_t num_tokens, int64_t num_seqs, int group, int num_kv_heads,
                                               int num_sms) {
    return work_map_item_offset(num_kv_heads, num_sms) +
           max_items(num_tokens, num_seqs, group, num_kv_heads, num_sms) * kItemInts;
}

}  // namespace fastkernels
