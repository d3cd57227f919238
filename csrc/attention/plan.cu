// The work map of a step: which block does which row tile over which part of the keys (host/attention_work_map.h).
//
// One block, three phases: (1) a scan over the sequences counts their row tiles; (2) a thread a tile counts the blocks
// of keys the tile sees, whose sum W over a list gives the length of its splits, c = ceil(W / target) but at least
// kMinSplitTiles; (3) a scan over the tiles gives each its ceil(blocks / c) items and its place in the workspace.
// So no item is longer than c unless the GPU is full without splitting, whatever the mix of lengths. Items are counted
// first, and c is raised until there are no more than the target, since the few above it would be waited for; but not
// where that leaves a third of the GPU idle. Tiles of a sequence come last first, since under a causal mask those see
// most keys. Bytes: 8 a sequence read, 48 an item written.
#include "attention/attention_decode.h"
#include "attention/attention_sm90.h"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "fastkernels/attention.h"
#include "host/attention_work_map.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// Sum of x over the threads before this one; total: over all. Every thread of the block calls it. Two scratches take
// turns: who comes to write one has passed the barrier behind which all have read it.
struct BlockScan {
    uint64_t (*scratch)[kWarps];  // [2], shared
    int turn = 0;

    __device__ uint64_t operator()(uint64_t x, uint64_t& total) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint64_t inclusive = warp_inclusive_scan(x, lane);
        uint64_t* sums = scratch[turn];
        turn ^= 1;
        if (lane == 31) {
            sums[warp] = inclusive;
        }
        __syncthreads();
        const uint64_t warps = warp_inclusive_scan(sums[lane], lane);
        total = __shfl_sync(0xffffffffu, warps, kWarps - 1);
        return inclusive - x + (__shfl_sync(0xffffffffu, warps, warp) - sums[warp]);
    }
};

// One of the two lists of items.
struct List {
    int64_t item_offset;
    int64_t most_items;
    int32_t target;  // items a KV head to aim at
    int32_t first_counter, first_partial_row;
    int32_t min_split_blocks;
};

struct PlanArgs {
    AttentionPlanParams p;
    int32_t group, decode_rows, tile_rows, num_counters, num_sms;
    List lists[2];  // decode, prefill
};

struct Lengths {
    int q_begin, len_q, k_begin, len_k;
};

__device__ __forceinline__ Lengths lengths(const AttentionPlanParams& p, int seq) {
    Lengths s;
    s.q_begin = p.cu_seqlens_q[seq];
    s.len_q = max(p.cu_seqlens_q[seq + 1] - s.q_begin, 0);
    s.k_begin = p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[seq] : 0;
    s.len_k = max(p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[seq + 1] - s.k_begin : p.seq_lens[seq], 0);
    return s;
}

__device__ __forceinline__ int count_tiles(int len_q, const PlanArgs& a) {
    const int64_t rows = static_cast<int64_t>(len_q) * a.group;
    return rows <= a.decode_rows ? (rows > 0) : static_cast<int>((rows + a.tile_rows - 1) / a.tile_rows);
}

struct Tile {
    int seq, index, rows, key_blocks;
    Lengths lengths;
};

// first_tile: [num_seqs + 1], the exclusive scan of count_tiles
__device__ Tile find_tile(int t, const int* first_tile, const PlanArgs& a) {
    int low = 0, high = static_cast<int>(a.p.num_seqs) - 1;               // the last sequence whose first tile is <= t
    if (t <= high && first_tile[t] == t && first_tile[t + 1] == t + 1) {  // of decodes alone it is sequence t
        low = high = t;
    }
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_tile[middle] <= t) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Tile tile;
    tile.seq = low;
    tile.lengths = lengths(a.p, low);
    tile.index = first_tile[low + 1] - 1 - t;
    const int len_q = tile.lengths.len_q, len_k = tile.lengths.len_k;
    const int64_t all_rows = static_cast<int64_t>(len_q) * a.group;
    const int64_t first_row = static_cast<int64_t>(tile.index) * a.tile_rows;
    tile.rows = static_cast<int>(min(all_rows - first_row, static_cast<int64_t>(a.tile_rows)));
    const int first_token = static_cast<int>(first_row / a.group);
    const int last_token = static_cast<int>((first_row + tile.rows - 1) / a.group);
    const int end = a.p.causal ? min(len_k, len_k - len_q + last_token + 1) : len_k;
    const int begin = a.p.window > 0 ? max(0, len_k - len_q + first_token - a.p.window + 1) : 0;
    tile.key_blocks = max(0, end - begin + kTileKeys - 1) / kTileKeys;
    return tile;
}

__device__ __forceinline__ int list_of(const Lengths& s, const PlanArgs& a) {
    return static_cast<int64_t>(s.len_q) * a.group > a.decode_rows;
}

// Items of a tile of a list; one that is longer than a split by a sixteenth stays whole.
__device__ __forceinline__ int count_splits(const Tile& tile, int list, int blocks_per_split) {
    const int splits = (tile.key_blocks - blocks_per_split / 16 + blocks_per_split - 1) / blocks_per_split;
    return max(1, min(splits, list == 0 ? kMaxDecodeSplits : max_splits(tile.rows)));
}

// The tiles of a step, a thread a tile. Of the first kThreads, all there are as a rule, each is found once.
struct Tiles {
    int count;
    const int* first_tile;
    Tile own;

    __device__ Tiles(int num_tiles, const int* first, const PlanArgs& a) : count(num_tiles), first_tile(first) {
        if (static_cast<int>(threadIdx.x) < count) {
            own = find_tile(threadIdx.x, first_tile, a);
        }
    }
    __device__ Tile operator()(int t, const PlanArgs& a) const {
        return t < kThreads ? own : find_tile(t, first_tile, a);
    }
};

// Blocks of keys a split of a list's tiles, c or as much more as keeps their items within the target. Every thread of
// the block calls it.
__device__ int fit_target(int c, int list, const Tiles& tiles, const PlanArgs& a, BlockScan& scan) {
    const int most = a.lists[list].target;
    int fitting = c;
    int64_t items = 0;
    for (int attempt = 0; attempt < 12; ++attempt) {
        uint64_t counts = 0, total;  // of items, and in the upper half of tiles
        for (int t = threadIdx.x; t < tiles.count; t += kThreads) {
            const Tile tile = tiles(t, a);
            if (list_of(tile.lengths, a) == list) {
                counts += (uint64_t{1} << 32) + count_splits(tile, list, fitting);
            }
        }
        scan(counts, total);
        items = static_cast<int64_t>(total & 0xffffffff);
        if (items <= most || static_cast<int64_t>(total >> 32) > most) {
            break;
        }
        fitting += static_cast<int>(max(fitting * (items - most) / (2 * most), int64_t{1}));
    }
    return items * 10 >= most * 7 ? fitting : c;
}

// The items of a list, in the order of the tiles; returns their number. Every thread of the block calls it.
__device__ int64_t write_items(int list, const Tiles& tiles, int blocks_per_split, const PlanArgs& a, BlockScan& scan) {
    // One scan for three counts: items (24 bits), rows of partial results (24), split tiles (16).
    WorkItem* items = reinterpret_cast<WorkItem*>(a.p.work_map + a.lists[list].item_offset);
    uint64_t done = 0, total;
    for (int base = 0; base < tiles.count; base += kThreads) {
        const int t = base + threadIdx.x;
        Tile tile{};
        int splits = 0;
        if (t < tiles.count) {
            tile = tiles(t, a);
            if (list_of(tile.lengths, a) == list) {
                splits = count_splits(tile, list, blocks_per_split);
            }
        }
        const bool split = splits > 1;
        const uint64_t counts = static_cast<uint64_t>(splits) |
                                static_cast<uint64_t>(split ? splits * tile.rows : 0) << 24 |
                                static_cast<uint64_t>(split) << 48;
        const uint64_t before = done + scan(counts, total);
        done += total;
        const int64_t first_item = before & 0xffffff;
        const int partial_row = a.lists[list].first_partial_row + static_cast<int>(before >> 24 & 0xffffff);
        const int counter = a.lists[list].first_counter + static_cast<int>(before >> 48);
        for (int s = 0; s < splits; ++s) {
            if (first_item + s < a.lists[list].most_items) {
                int4* item = reinterpret_cast<int4*>(items + first_item + s);
                item[0] = make_int4(tile.seq, tile.index, s, splits);
                item[1] = make_int4(partial_row, counter, tile.lengths.q_begin, tile.lengths.len_q);
                item[2] = make_int4(tile.lengths.k_begin, tile.lengths.len_k, 0, 0);
            }
        }
    }
    return min(static_cast<int64_t>(done & 0xffffff), a.lists[list].most_items);
}

// How many SMs the prefill items of a mixed step take at once; the decode items begin on the others, and go on wherever
// prefill ends. A block of keys costs a prefill tile its matrix products and a decode tile the reading of the keys. An
// SM is taken to do 5 TFLOP/s and, while most others do not, to read 75 GB/s: a decode tile then costs as much as 66
// rows. It is counted as 50, since SMs that prefill leaves serve decodes, but not the other way round; and with more
// than 2 / 5 of the SMs decodes would only share the bandwidth.
__device__ __forceinline__ int prefill_sms(uint64_t decode_blocks, uint64_t prefill_blocks, int tile_rows,
                                           int num_sms) {
    const float decode = 50.0f * static_cast<float>(decode_blocks);
    const float prefill = static_cast<float>(tile_rows) * static_cast<float>(prefill_blocks);
    const float share = prefill > 0.0f ? fminf(decode / (decode + prefill), 0.4f) : 0.0f;
    return num_sms - static_cast<int>(share * static_cast<float>(num_sms));
}

__global__ void __launch_bounds__(kThreads) attention_plan_kernel(const PlanArgs a) {
    extern __shared__ int first_tile[];
    __shared__ uint64_t scratch[2][kWarps];
    const int thread = threadIdx.x, num_seqs = static_cast<int>(a.p.num_seqs);
    BlockScan scan{scratch};
    pdl_wait();
    pdl_launch_dependents();

    uint64_t num_tiles = 0, total;  // the upper half: of prefill
    for (int base = 0; base < num_seqs; base += kThreads) {
        const int seq = base + thread;
        uint64_t tiles = 0;
        if (seq < num_seqs) {
            const Lengths s = lengths(a.p, seq);
            tiles = static_cast<uint64_t>(count_tiles(s.len_q, a));
            tiles |= list_of(s, a) == 1 ? tiles << 32 : 0;
        }
        const uint64_t before = num_tiles + scan(tiles, total);
        if (seq < num_seqs) {
            first_tile[seq] = static_cast<int>(before & 0xffffffff);
        }
        num_tiles += total;
    }
    const int all_tiles = static_cast<int>(num_tiles & 0xffffffff), prefill_tiles = static_cast<int>(num_tiles >> 32);
    if (thread == 0) {
        first_tile[num_seqs] = all_tiles;
    }
    for (int i = thread; i < a.num_counters; i += kThreads) {
        a.p.work_map[kHeaderInts + i] = 0;
    }
    __syncthreads();

    const Tiles tiles(all_tiles, first_tile, a);
    uint64_t key_blocks = 0;  // of decode, and in the upper half of prefill
    for (int t = thread; t < all_tiles; t += kThreads) {
        const Tile tile = tiles(t, a);
        key_blocks += static_cast<uint64_t>(tile.key_blocks) << (list_of(tile.lengths, a) == 1 ? 32 : 0);
    }
    uint64_t all_key_blocks;
    scan(key_blocks, all_key_blocks);
    const uint32_t list_blocks[2] = {static_cast<uint32_t>(all_key_blocks),
                                     static_cast<uint32_t>(all_key_blocks >> 32)};
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        int64_t num_items = 0;
        if ((i == 0 ? all_tiles - prefill_tiles : prefill_tiles) > 0) {
            const uint32_t blocks = i == 0 ? list_blocks[0] : list_blocks[1], target = a.lists[i].target;
            const int share = max(a.lists[i].min_split_blocks, static_cast<int>((blocks + target - 1) / target));
            num_items = write_items(i, tiles, fit_target(share, i, tiles, a, scan), a, scan);
        }
        if (thread == 0) {
            a.p.work_map[i] = static_cast<int>(num_items);
        }
    }
    if (thread == 0) {
        a.p.work_map[2] = 0;
        a.p.work_map[3] = prefill_sms(list_blocks[0], list_blocks[1], a.tile_rows, a.num_sms);
    }
}

}  // namespace

void attention_plan_cuda(const AttentionPlanParams& p, void* stream) {
    if (p.num_tokens == 0 || p.num_seqs == 0) {
        return;
    }
    check(p.num_seqs <= 50000, "attention_plan takes up to 50000 sequences, got ", p.num_seqs);
    check(reinterpret_cast<uintptr_t>(p.work_map) % 16 == 0, "the work map must be aligned to 16 bytes");
    const int group = p.num_q_heads / p.num_kv_heads, sms = num_sms();
    const int64_t target = target_items(p.num_kv_heads, sms);
    const int64_t decode_target = decode_target_items(p.num_kv_heads, sms);
    const bool large_blocks = decodes_in_large_blocks(p.num_tokens, group, p.head_dim);
    const bool sm90 = prefill_on_sm90(p.num_tokens, p.head_dim, group, p.dtype);
    const PlanArgs a{
        .p = p,
        .group = group,
        .decode_rows = decode_rows(p.head_dim, group),
        .tile_rows = sm90 ? prefill_rows_sm90(p.head_dim, group) : prefill_rows(p.head_dim),
        .num_counters = static_cast<int32_t>(num_counters(p.num_kv_heads, sms)),
        .num_sms = sms,
        .lists = {{.item_offset = work_map_item_offset(p.num_kv_heads, sms),
                   .most_items = max_decode_items(p.num_tokens, p.num_seqs, p.num_kv_heads, sms),
                   .target =
                       large_blocks ? large_block_items(p.num_kv_heads, sms) : static_cast<int32_t>(decode_target),
                   .first_counter = 0,
                   .first_partial_row = 0,
                   .min_split_blocks = p.num_tokens < kFewTokens ? kMinSplitTilesOfFew : kMinSplitTiles},
                  {.item_offset = work_map_prefill_item_offset(p.num_tokens, p.num_seqs, p.num_kv_heads, sms),
                   .most_items = max_prefill_items(p.num_tokens, p.num_seqs, group, p.num_kv_heads, sms),
                   .target = static_cast<int32_t>(target),
                   .first_counter = static_cast<int32_t>(decode_target),
                   .first_partial_row = static_cast<int32_t>(
                       first_prefill_partial_row(p.num_tokens, group, p.head_dim, p.num_kv_heads, sms)),
                   .min_split_blocks = sm90 ? kMinPrefillSplitTiles : kMinSplitTiles}},
    };
    const size_t shared_bytes = static_cast<size_t>(p.num_seqs + 1) * sizeof(int);
    launch(attention_plan_kernel, {.grid = dim3(1), .block = dim3(kThreads), .shared_bytes = shared_bytes, .pdl = true},
           stream, a);
}

}  // namespace fastkernels
