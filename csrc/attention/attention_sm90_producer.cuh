// The producer of attention_sm90: one warp takes tiles and loads Q, three load K and V.
#pragma once

#include "attention/attention_sm90_shared.cuh"
#include "attention/attention_sm90_widen.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"

namespace fastkernels {
namespace {

// Field by field, to and from shared memory: the producer has few registers.
__device__ __forceinline__ void make_tile(Tile& t, const AttentionMmaArgs& a, const WorkItem& item, int kv_head,
                                          int tile_tokens, int block_keys, int box_keys) {
    const AttentionParams& p = a.p;
    t.kv_head = kv_head;
    t.num_splits = item.num_splits;
    t.partial_row = item.partial_row;
    t.counter = item.counter;
    t.seq = item.seq;
    t.k_begin = item.k_begin;
    const int len_k = item.len_k, len_q = item.len_q, first = item.tile * tile_tokens;
    const int tokens = min(len_q - first, tile_tokens);
    const int first_position = len_k - len_q + first, last_position = first_position + tokens - 1;
    t.len_k = len_k;
    t.rows = tokens * a.group;
    t.first_token = item.q_begin + first;
    t.first_position = first_position;
    t.last_position = last_position;
    // The first key is that of a box, so that a box is never of two pages.
    const int begin = p.window > 0 ? max(0, first_position - p.window + 1) & -box_keys : 0;
    const int end = p.causal ? min(len_k, last_position + 1) : len_k;
    const int blocks = max(0, end - begin + block_keys - 1) / block_keys;
    const int split = item.split, split_blocks = (blocks + item.num_splits - 1) / item.num_splits;
    t.split = split;
    t.begin = begin + split * split_blocks * block_keys;
    t.end = min(end, begin + (split + 1) * split_blocks * block_keys);
    t.num_blocks = max(1, min(blocks - split * split_blocks, split_blocks));
}

// Warp 0: takes tiles from the list, tells the others, and loads Q.
// Where keys are widened to fp16, queries of bf16 become that too.
template <typename Shared>
__device__ __forceinline__ void produce_tiles(const Sm90Args& args, Shared& shared, int num_tiles, int participants) {
    using Shape = typename Shared::Shape;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32;
    const auto item_of = [&](int index) { return index / p.num_kv_heads; };
    const auto head_of = [&](int index) { return index % p.num_kv_heads; };
    const auto item_word = [&](int index) {  // a lane a word, fetched while the tile before is waited for
        const int32_t* items = p.work_map + args.item_offset;
        return lane < kItemInts && index < num_tiles ? items[item_of(index) * kItemInts + lane] : 0;
    };
    const bool rounds_q = Shape::kWidens && p.dtype == DType::bf16;
    uint32_t q_landed_parity = 0;
    Place<Shape::kQSlots> place;
    int index = blockIdx.x, word = item_word(index);
    for (;; place.next()) {
        mbarrier_wait(shared_address(&shared.q_empty[place.slot]), place.parity ^ 1);
        if (lane < kItemInts) {
            reinterpret_cast<int*>(&shared.item)[lane] = word;
        }
        __syncwarp();
        Tile& tile = shared.tiles[place.slot];
        const uint32_t tile_full = shared_address(&shared.tile_full[place.slot]);
        const uint32_t q_full = shared_address(&shared.q_full[place.slot]);
        uint32_t q_barrier = q_full;
        if constexpr (Shape::kWidens) {
            q_barrier = rounds_q ? shared_address(&shared.q_landed) : q_full;
        }
        if (index >= num_tiles) {
            if (lane == 0) {
                tile.rows = 0;
                mbarrier_arrive(tile_full);
                mbarrier_arrive(q_full);
            }
            break;
        }
        unsigned taken = 0;
        if (lane == 0) {
            // Wraps to 0 after the last, ready for the next launch.
            taken = atomicInc(reinterpret_cast<unsigned*>(const_cast<int32_t*>(p.work_map) + 2), num_tiles - 1);
            make_tile(tile, a, shared.item, head_of(index), args.tile_tokens, Shape::kKeys, 1 << args.box_shift);
            if constexpr (Shape::kWidens) {
                tile.k_scale = p.k_scale != nullptr ? p.k_scale[tile.kv_head] : 1.0f;
            }
            mbarrier_arrive(tile_full);
            mbarrier_arrive_expect_bytes(q_barrier, Shape::kPanels * args.tile_tokens * a.group * 128);
#pragma unroll 1
            for (int i = 0; i < Shape::kPanels; ++i) {
                tma_load(shared_address(shared.q[place.slot]) + i * (Shape::kRows * 128), args.q_map,
                         i * Shape::kPanelColumns, tile.kv_head * a.group, tile.first_token, q_barrier);
            }
        }
        if constexpr (Shape::kWidens) {
            if (rounds_q) {
                mbarrier_wait(shared_address(&shared.q_landed), q_landed_parity);
                q_landed_parity ^= 1;
                round_queries<Shape::kQBytes>(shared_address(shared.q[place.slot]), lane);
                if (lane == 0) {
                    mbarrier_arrive(q_full);
                }
            }
        }
        __syncwarp();  // shared.item has been read
        index = participants + __shfl_sync(0xffffffffu, taken, 0);
        word = item_word(index);
    }
}

// Warps 1 to 3 take the places of K0, K1, V0, K2, V1 ... V(n - 2), V(n - 1) in turn, across tiles too. The last block
// of keys is number 0. A lane loads a box. Bytes the warp then widens to fp16, where they lie.
template <typename Shape>
__device__ __forceinline__ void produce_keys(const Sm90Args& args, Sm90Shared<Shape>& shared, int warp) {
    constexpr int kKeys = Shape::kKeys, kPanels = Shape::kBoxPanels, kLoaders = Shape::kLoaders;
    constexpr int kFirstPanel = Shape::kPanels - kPanels;  // of a place, for boxes
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32, box_shift = args.box_shift;
    const int panel = lane % kPanels, box_key = lane / kPanels << box_shift;  // this lane's box in a block
    const bool paged = p.page_size > 0;
    int num_landed = 0;  // places that this warp changed

    Place<Shape::kQSlots> tile_place;
    Place<Shape::kSlots> place;
    int i = warp - 1;  // of the places of a tile
    place.advance(i);
    for (;;) {
        mbarrier_wait(shared_address(&shared.tile_full[tile_place.slot]), tile_place.parity);
        const Tile& tile = shared.tiles[tile_place.slot];  // read where it is needed: registers are scarce
        if (tile.rows == 0) {
            break;
        }
        const int num_blocks = tile.num_blocks;
        const int32_t* pages = paged ? p.page_table + tile.seq * p.page_table_seq_stride : nullptr;
        const auto is_v = [&](int place) { return place > 0 && (place % 2 == 0 || place == 2 * num_blocks - 1); };
        const auto first_key = [&](int place) {  // of the block at a place
            const int block = is_v(place) ? (place - 1) / 2 : (place + 1) / 2;
            return tile.begin + (num_blocks - 1 - block) * kKeys;
        };
        const auto look_up = [&](int place) {  // the row of this lane's box
            const int key = first_key(place) + box_key;
            if (!paged) {
                return tile.k_begin + key;
            }
            if (place >= 2 * num_blocks || key >= tile.len_k || box_key >= kKeys) {
                return 0;
            }
            return static_cast<int>(static_cast<uint32_t>(pages[(key >> a.page_shift) * p.page_table_page_stride]) *
                                        a.page_rows +
                                    tile.kv_head * p.page_size + (key & (p.page_size - 1)));
        };
        // keys: that the sequence has from the place's first on. Read anew where it is called: registers are scarce.
        const auto load = [&](int place, uint32_t to, int keys, int row, uint32_t barrier) {
            const int boxes = max(0, min(kKeys, keys + (1 << box_shift) - 1)) >> box_shift;
            if (lane == 0) {
                mbarrier_arrive_expect_bytes(barrier, boxes * kPanels << box_shift << 7);
            }
            __syncwarp();
            if (lane < boxes * kPanels) {
                tma_load(to + ((kFirstPanel + panel) * kKeys + box_key) * 128, is_v(place) ? args.v_map : args.k_map,
                         panel * Shape::kBoxColumns, paged ? 0 : tile.kv_head, row, barrier);
            }
        };
        int row = look_up(i);
#pragma unroll 1
        for (; i < 2 * num_blocks; i += kLoaders) {
            const int next_row = look_up(i + kLoaders);
            const int keys = tile.len_k - first_key(i);
            const uint32_t slot = shared_address(shared.ring[place.slot]);
            const uint32_t landed = shared_address(&shared.landed[warp - 1]);
            if constexpr (Shape::kWidens) {
                const uint32_t full = shared_address(&shared.full[place.slot]);
                mbarrier_wait(shared_address(&shared.empty[place.slot]), place.parity ^ 1);
                load(i, slot, keys, row, landed);
                mbarrier_wait(landed, num_landed % 2);
                ++num_landed;
                widen<Shape>(p.kv_dtype, slot, keys, lane);
                fence_async_shared();
                mbarrier_arrive(full);  // every lane, for what it wrote
            } else {
                const bool zeroes = is_v(i) && keys < kKeys;
                mbarrier_wait(shared_address(&shared.empty[place.slot]), place.parity ^ 1);
                load(i, shared_address(shared.ring[place.slot]), tile.len_k - first_key(i), row,
                     zeroes ? landed : shared_address(&shared.full[place.slot]));
                if (zeroes) {
                    mbarrier_wait(landed, num_landed % 2);
                    ++num_landed;
#pragma unroll 1
                    for (int j = max(0, keys) * 8 + lane; j < kKeys * 8; j += 32) {
#pragma unroll
                        for (int column = 0; column < kPanels; ++column) {
                            store_shared_16(slot + column * (kKeys * 128) + j * 16, make_uint4(0, 0, 0, 0));
                        }
                    }
                    fence_async_shared();
                    __syncwarp();
                    if (lane == 0) {
                        mbarrier_arrive(shared_address(&shared.full[place.slot]));
                    }
                }
            }
            row = next_row;
            place.advance(kLoaders);
        }
        i -= 2 * num_blocks;
        mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        tile_place.next();
    }
}

}  // namespace
}  // namespace fastkernels
