// The prefill tiles of attention on Hopper: out = softmax(scale * q k^T + mask) v by TMA and wgmma.
//
//   q, out [num_tokens, num_q_heads, D]   k, v [num_keys, num_kv_heads, D] or the pages of the KV cache   bf16 | fp16
//
// One block stays on each SM and takes tiles from the list of prefill items, in its order, by a counter. A tile is 64
// packed rows (row r is token r / group, head r % group) for each consumer warpgroup, against the keys of one KV head
// in blocks of kKeys, the last block first.
//   Producer, 4 warps: look pages up and issue TMA loads. Q has kQSlots places. K and V blocks go through one ring,
//   in the order in which they are used: K0, K1, V0, K2, V1 ... A lane loads one box: 64 columns of the keys of one
//   page, or of kKeys contiguous ones. Keys past the end of a sequence (other sequences', stale pages) are zeroed in
//   the block of V where they occur, since 0 x NaN is NaN; in K they are masked out.
//   Consumers, 64 rows each: S of the next block is issued before P V of the present one, and the softmax of a
//   warpgroup runs while the others multiply (they issue in turn). P goes from the accumulators of S to the A operand
//   in registers. The output passes through Q's place in shared memory, so that it is stored in pieces of 16 bytes.
// Softmax is online, in powers of 2. Masks are applied only to the first block and to blocks that cross an edge.
// Split tiles are combined by the item that finishes last, in the order of the splits, as in attention_mma.cuh.
//
// FLOPs: 4 * D a row and key. Bytes from L2: the keys once a tile, 4 * D a key.
// Source: Shah et al. 2024 (FlashAttention-3), Kwon et al. 2023 (paged KV).
#pragma once

#include "attention/attention_sm90.h"
#include "attention/attention_sm90_args.h"
#include "common/launch.h"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/rcp.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"

namespace fastkernels {
namespace {

constexpr float kNegInf = -INFINITY;

// What the producer tells the consumers about a tile.
struct Tile {
    int rows;         // 0: there are no more tiles
    int first_token;  // of q and out
    int kv_head;
    int first_position, last_position;  // of its tokens in the sequence
    int begin, end, num_blocks;         // of keys; at least one block, which may be empty
    int split, num_splits, partial_row, counter;
    int seq, k_begin, len_k;
};

template <int D>
struct Sm90Shared {
    using Shape = Sm90Shape<D>;
    alignas(1024) unsigned char q[Shape::kQSlots][Shape::kQBytes];
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];
    uint64_t tile_full[Shape::kQSlots], q_full[Shape::kQSlots], q_empty[Shape::kQSlots];
    uint64_t tail[Shape::kLoaders];  // a block of V whose end is to be zeroed
    Tile tiles[Shape::kQSlots];
    WorkItem item;  // of the tile that warp 0 prepares
    int last;       // whether this block combines the tile's splits
};

// Named barriers: 0 is __syncthreads.
constexpr int kTurnBarrier = 1;       // and the next ones: a consumer warpgroup's turn to issue
constexpr int kGroupBarrier = 4;      // and the next ones: the four warps of a consumer warpgroup
constexpr int kConsumersBarrier = 7;  // all consumers

// A place in a ring and the parity of its phase.
template <int kSlots>
struct Place {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        advance(1);
    }
    __device__ __forceinline__ void advance(int steps) {
        slot += steps;
        if (slot >= kSlots) {
            slot -= kSlots;
            parity ^= 1;
        }
    }
};

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

// --- The producer ----------------------------------------------------------------------------------------------------

// Warp 0: takes tiles from the list, tells the others, and loads Q.
template <int D>
__device__ __forceinline__ void produce_tiles(const Sm90Args& args, Sm90Shared<D>& shared, int num_tiles,
                                              int participants) {
    using Shape = Sm90Shape<D>;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32;
    const auto item_of = [&](int index) { return index / p.num_kv_heads; };
    const auto head_of = [&](int index) { return index % p.num_kv_heads; };
    const auto item_word = [&](int index) {  // a lane a word, fetched while the tile before is waited for
        const int32_t* items = p.work_map + args.item_offset;
        return lane < kItemInts && index < num_tiles ? items[item_of(index) * kItemInts + lane] : 0;
    };
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
            mbarrier_arrive(tile_full);
            mbarrier_arrive_expect_bytes(q_full, Shape::kPanels * args.tile_tokens * a.group * 128);
#pragma unroll 1
            for (int i = 0; i < Shape::kPanels; ++i) {
                tma_load(shared_address(shared.q[place.slot]) + i * (Shape::kRows * 128), args.q_map, i * 64,
                         tile.kv_head * a.group, tile.first_token, q_full);
            }
        }
        index = participants + __shfl_sync(0xffffffffu, taken, 0);
        word = item_word(index);
    }
}

// Warps 1 to 3 take the places of K0, K1, V0, K2, V1 ... V(n - 2), V(n - 1) in turn, across tiles too. The last block
// of keys is number 0. A lane loads a box.
template <int D>
__device__ __forceinline__ void produce_keys(const Sm90Args& args, Sm90Shared<D>& shared, int warp) {
    using Shape = Sm90Shape<D>;
    constexpr int kKeys = Shape::kKeys, kPanels = Shape::kPanels, kLoaders = Shape::kLoaders;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32, box_shift = args.box_shift;
    const int panel = lane % kPanels, box_key = lane / kPanels << box_shift;  // this lane's box in a block
    const bool paged = p.page_size > 0;
    const uint32_t tail = shared_address(&shared.tail[warp - 1]);
    uint32_t tail_parity = 0;

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
        int row = look_up(i);
#pragma unroll 1
        for (; i < 2 * num_blocks; i += kLoaders) {
            const int next_row = look_up(i + kLoaders);
            const bool v = is_v(i);
            const int keys = tile.len_k - first_key(i);  // that the sequence has from here on
            const int boxes = max(0, min(kKeys, keys + (1 << box_shift) - 1)) >> box_shift;
            const uint32_t full = shared_address(&shared.full[place.slot]);
            const uint32_t slot = shared_address(shared.ring[place.slot]);
            const bool zeroes = v && keys < kKeys;
            const uint32_t barrier = zeroes ? tail : full;
            mbarrier_wait(shared_address(&shared.empty[place.slot]), place.parity ^ 1);
            if (lane == 0) {
                mbarrier_arrive_expect_bytes(barrier, boxes * kPanels << box_shift << 7);
            }
            __syncwarp();
            if (lane < boxes * kPanels) {
                tma_load(slot + (panel * kKeys + box_key) * 128, v ? args.v_map : args.k_map, panel * 64,
                         paged ? 0 : tile.kv_head, row, barrier);
            }
            if (zeroes) {
                mbarrier_wait(tail, tail_parity);
                tail_parity ^= 1;
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
                    mbarrier_arrive(full);
                }
            }
            row = next_row;
            place.advance(kLoaders);
        }
        i -= 2 * num_blocks;
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        }
        tile_place.next();
    }
}

// --- A consumer ------------------------------------------------------------------------------------------------------

// Rows g and g + 8 of a warp (wgmma.cuh): their running maximum and this lane's part of the sums.
struct RowState {
    float max[2], sum[2];
};

// Scores to -inf where the key is outside [first, last) of the lane's rows, counted from the lane's first column.
template <int kCount>
__device__ __forceinline__ void mask_scores(float (&s)[kCount], const int (&first)[2], const int (&last)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int key = i / 4 * 8 + i % 2, half = i / 2 % 2;
        if (key >= last[half] || key < first[half]) {
            s[i] = kNegInf;
        }
    }
}

// S becomes 2^(exponent * (S - max)); returns whether what was summed before must be scaled, and by how much. A maximum
// that grows by less than 2^kSlack stays as it was, so that this is rare; weights are then at most that. kMasked: a row
// may have seen no key yet, its maximum -inf.
constexpr float kSlack = 8.0f;

template <bool kMasked, int kCount>
__device__ __forceinline__ bool softmax(float (&s)[kCount], RowState& rows, float (&correction)[2], float exponent) {
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = s[half * 2];
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            m = fmaxf(m, fmaxf(s[i + half * 2], s[i + half * 2 + 1]));
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        const bool row_grows = (m - rows.max[half]) * exponent > kSlack;  // false where both are -inf
        m = row_grows ? m : rows.max[half];
        const float shift = (kMasked && m == kNegInf ? 0.0f : m) * exponent;
        correction[half] = row_grows ? exp2_approx(rows.max[half] * exponent - shift) : 1.0f;
        rows.max[half] = m;
        grows |= row_grows;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = s[i + half * 2 + e];
                x = exp2_approx(fmaf(x, exponent, -shift));
                sum += x;
            }
        }
        rows.sum[half] = rows.sum[half] * correction[half] + sum;
    }
    return __any_sync(0xffffffffu, grows);
}

// ptxas would put the wait for P V ahead of the softmax that is to run beside it, were it not for a branch between
// them that hangs on what the softmax made: sums, which are never negative.
__device__ __forceinline__ void hold_back(const float (&sum)[2]) {
    if (__any_sync(0xffffffffu, sum[0] < 0.0f || sum[1] < 0.0f)) {
        __nanosleep(0);
    }
}

// tanh(x) = 1 - 2 / (1 + e^2x)
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float tanh_exponent) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        s[i] = fmaf(-2.0f, rcp_approx(1.0f + exp2_approx(s[i] * tanh_exponent)), 1.0f);
    }
}

template <int D>
__device__ __forceinline__ float* partial_row(const AttentionMmaArgs& a, const Tile& t, int split, int row) {
    const int64_t index = t.partial_row + static_cast<int64_t>(split) * t.rows + row;
    return a.p.workspace + (index * a.p.num_kv_heads + t.kv_head) * (D + kPartialExtra);
}

template <typename T>
__device__ __forceinline__ T* out_row(const Sm90Args& args, const Tile& t, int row) {
    const AttentionParams& p = args.a.p;
    const int token = args.token_of(row), head = row - token * args.a.group;
    return static_cast<T*>(p.out) + (t.first_token + token) * p.out_token_stride +
           (t.kv_head * args.a.group + head) * p.out_head_stride;
}

// The parts of a split tile, added up by all consumers of the block that wrote the last of them.
template <typename T, int D>
__device__ void combine_if_last(const Sm90Args& args, const Tile& t, int* last) {
    const AttentionMmaArgs& a = args.a;
    constexpr int kThreads = Sm90Shape<D>::kConsumers * 128;
    const int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    __threadfence();
    named_barrier_sync(kConsumersBarrier, kThreads);
    if (thread == 0) {
        int32_t* counters = const_cast<int32_t*>(a.p.work_map) + kHeaderInts;
        const unsigned before = atomicInc(
            reinterpret_cast<unsigned*>(counters + static_cast<int64_t>(t.counter) * a.p.num_kv_heads + t.kv_head),
            t.num_splits - 1);
        *last = before == static_cast<unsigned>(t.num_splits - 1);
    }
    named_barrier_sync(kConsumersBarrier, kThreads);
    if (*last == 0) {
        return;
    }
    __threadfence();
    for (int row = warp; row < t.rows; row += kThreads / 32) {
        float m = kNegInf, sum = 0.0f;
        for (int s = 0; s < t.num_splits; ++s) {
            m = fmaxf(m, __ldcg(partial_row<D>(a, t, s, row) + D));
        }
        m = m == kNegInf ? 0.0f : m;
        for (int s = 0; s < t.num_splits; ++s) {
            const float2 part = __ldcg(reinterpret_cast<const float2*>(partial_row<D>(a, t, s, row) + D));
            sum += exp2_approx(part.x - m) * part.y;
        }
        const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
        T* out = out_row<T>(args, t, row);
        for (int column = lane * 4; column < D; column += 128) {
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int s = 0; s < t.num_splits; ++s) {
                const float* partial = partial_row<D>(a, t, s, row);
                const float weight = exp2_approx(__ldcg(partial + D) - m) * scale;
                const float4 y = __ldcg(reinterpret_cast<const float4*>(partial + column));
                x.x += y.x * weight;
                x.y += y.y * weight;
                x.z += y.z * weight;
                x.w += y.w * weight;
            }
            *reinterpret_cast<uint2*>(out + column) = make_uint2(pack_pair<T>(x.x, x.y), pack_pair<T>(x.z, x.w));
        }
    }
}

template <typename T, int D, bool kSoftCap>
__device__ __forceinline__ void consume(const Sm90Args& args, Sm90Shared<D>& shared) {
    using Shape = Sm90Shape<D>;
    constexpr int kKeys = Shape::kKeys, kConsumers = Shape::kConsumers;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / 128 - 1, 0), warp = threadIdx.x / 32 % 4,
              lane = threadIdx.x % 32;
    const int quad = lane % 4, row = consumer * 64 + warp * 16 + lane / 4;  // and row + 8
    const bool elected = lane == 0;

    Place<Shape::kQSlots> q_place;
    Place<Shape::kSlots> place;
    if (kConsumers > 1 && consumer == 0) {
        named_barrier_arrive(kTurnBarrier, 256);  // the first turn
    }
    float o[D / 2], s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];  // P

    const auto q_shared = [&](int slot) { return shared_address(shared.q[slot]) + consumer * (64 * 128); };
    const auto wait_full = [&] { mbarrier_wait(shared_address(&shared.full[place.slot]), place.parity); };
    const auto release = [&](int slot) {
        if (elected) {
            mbarrier_arrive(shared_address(&shared.empty[slot]));
        }
    };
    const auto issue_scores = [&](int q_slot) {
        const uint32_t q = q_shared(q_slot), k = shared_address(shared.ring[place.slot]);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            wgmma_ss<T, kKeys>(s, wgmma_k_major(q + d / 4 * (Shape::kRows * 128) + d % 4 * 32),
                               wgmma_k_major(k + d / 4 * (kKeys * 128) + d % 4 * 32), d > 0);
        }
        wgmma_commit();
    };
    const auto issue_output = [&] {
        const uint32_t v = shared_address(shared.ring[place.slot]);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
            wgmma_rs<T, D>(o, weights[i], wgmma_n_major(v + i * 2048, kKeys * 128), 1);
        }
        wgmma_commit();
    };
    const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                weights[i][j] = pack_pair<T>(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
            }
        }
    };
    // Waits for the tile at q_place; false when there are no more.
    const auto wait_tile = [&] {
        mbarrier_wait(shared_address(&shared.q_full[q_place.slot]), q_place.parity);
        return shared.tiles[q_place.slot].rows > 0;
    };

    wait_tile();  // a block that runs has a tile
    wait_full();
    wgmma_fence();
    issue_scores(q_place.slot);
    for (bool more = true; more;) {
        const Tile& tile = shared.tiles[q_place.slot];  // read where it is needed: registers are scarce
        const int q_slot = q_place.slot;

        // --- Where masks begin ---------------------------------------------------------------------------------------
        int row_first[2], row_last[2];  // keys [first, last) that the lane's rows see, from its first column of keys
        int mask_from, mask_below;      // blocks at and past the causal edge or the end, and before the window's
        {
            const int begin = tile.begin, end = tile.end;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int position = tile.first_position + args.token_of(row + half * 8);
                row_last[half] = (p.causal ? min(end, position + 1) : end) - begin - quad * 2;
                row_first[half] = (p.window > 0 ? position - p.window + 1 : 0) - begin - quad * 2;
            }
            mask_from = max(0, (p.causal ? min(end, tile.first_position + 1) : end) - begin) / kKeys;
            mask_below = p.window > 0 ? max(0, tile.last_position - p.window + kKeys - begin) / kKeys : 0;
        }

        RowState rows = {{kNegInf, kNegInf}, {0.0f, 0.0f}};
        float correction[2];
        const auto weigh = [&](auto masked, int block) {
            if constexpr (kSoftCap) {
                cap_scores(s, a.tanh_exponent);
            }
            if constexpr (decltype(masked)::value) {
                const int first[2] = {row_first[0] - block * kKeys, row_first[1] - block * kKeys};
                const int last[2] = {row_last[0] - block * kKeys, row_last[1] - block * kKeys};
                mask_scores(s, first, last);
            }
            return softmax<decltype(masked)::value>(s, rows, correction, a.exponent);
        };

        // --- The first block of keys, S of which is under way --------------------------------------------------------
        int block = tile.num_blocks - 1;
        wgmma_wait<0>();
        wgmma_hold(s);
        release(place.slot);
        place.next();
        weigh(std::true_type{}, block);
        round_weights();
#pragma unroll
        for (int i = 0; i < D / 2; ++i) {
            o[i] = 0.0f;
        }

        // --- S of a block, then P V of the one before ----------------------------------------------------------------
        const auto step = [&](auto masked) {
            wait_full();
            if (kConsumers > 1) {
                named_barrier_sync(kTurnBarrier + consumer, 256);
            }
            const int k_slot = place.slot;
            wgmma_fence();
            issue_scores(q_slot);
            place.next();
            wait_full();
            const int v_slot = place.slot;
            wgmma_fence();
            issue_output();
            place.next();
            if (kConsumers > 1) {
                named_barrier_arrive(kTurnBarrier + (consumer + 1 == kConsumers ? 0 : consumer + 1), 256);
            }
            wgmma_wait<1>();
            wgmma_hold(s);
            release(k_slot);
            const bool grows = weigh(masked, block);
            if constexpr (Shape::kHoldBack) {
                hold_back(rows.sum);
            }
            wgmma_wait<0>();
            wgmma_hold(o);
            release(v_slot);
            round_weights();
            if (grows) {
#pragma unroll
                for (int i = 0; i < D / 2; ++i) {
                    o[i] *= correction[i / 2 % 2];
                }
            }
        };
        --block;
        if constexpr (!kSoftCap) {  // beside whose tanh the mask costs little
            for (; block >= mask_from; --block) {
                step(std::true_type{});
            }
            for (; block >= mask_below; --block) {
                step(std::false_type{});
            }
        }
        for (; block >= 0; --block) {
            step(std::true_type{});
        }

        // --- The output ----------------------------------------------------------------------------------------------
        const auto store = [&] {
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                rows.sum[half] += __shfl_xor_sync(0xffffffffu, rows.sum[half], 1);
                rows.sum[half] += __shfl_xor_sync(0xffffffffu, rows.sum[half], 2);
                scale[half] = rows.sum[half] > 0.0f ? rcp_approx(rows.sum[half]) : 0.0f;
            }
            const uint32_t q_empty = shared_address(&shared.q_empty[q_slot]);
            if (tile.num_splits == 1) {
                // To Q's place, as wgmma and TMA would have it, then in pieces of 16 bytes along the rows.
                named_barrier_sync(kGroupBarrier + consumer, 128);  // no warp of the warpgroup needs its queries now
                const uint32_t warp_shared = q_shared(q_slot) + warp * (16 * 128);
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    const uint32_t address = warp_shared + i / 4 * (Shape::kRows * 128) + lane % 16 * 128 +
                                             ((i % 4 * 2 + lane / 16) ^ lane % 8) * 16;
                    const float* x = o + i * 8;
                    stmatrix_x4(address, pack_pair<T>(x[0] * scale[0], x[1] * scale[0]),
                                pack_pair<T>(x[2] * scale[1], x[3] * scale[1]),
                                pack_pair<T>(x[4] * scale[0], x[5] * scale[0]),
                                pack_pair<T>(x[6] * scale[1], x[7] * scale[1]));
                }
                fence_async_shared();  // TMA writes there next
                __syncwarp();
                constexpr int kPieces = D / 8;
                uint4 x[kPieces / 2];
#pragma unroll
                for (int i = 0; i < kPieces / 2; ++i) {
                    const int r = (i * 32 + lane) / kPieces, piece = (i * 32 + lane) % kPieces;
                    x[i] = load_shared_16(warp_shared + piece / 8 * (Shape::kRows * 128) + r * 128 +
                                          ((piece % 8) ^ r % 8) * 16);
                }
                const bool skipped = p.page_size > 0 && tile.len_k == 0;
                const int tile_rows = skipped ? 0 : tile.rows;
#pragma unroll
                for (int i = 0; i < kPieces / 2; ++i) {
                    const int r = (i * 32 + lane) / kPieces, piece = (i * 32 + lane) % kPieces;
                    const int tile_row = consumer * 64 + warp * 16 + r;
                    if (tile_row < tile_rows) {
                        *reinterpret_cast<uint4*>(out_row<T>(args, tile, tile_row) + piece * 8) = x[i];
                    }
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (row + half * 8 < tile.rows) {
                        float* partial = partial_row<D>(a, tile, tile.split, row + half * 8);
#pragma unroll
                        for (int n = 0; n < D / 8; ++n) {
                            *reinterpret_cast<float2*>(partial + n * 8 + quad * 2) =
                                make_float2(o[n * 4 + half * 2], o[n * 4 + half * 2 + 1]);
                        }
                        if (quad == 0) {
                            *reinterpret_cast<float2*>(partial + D) =
                                make_float2(rows.max[half] * a.exponent, rows.sum[half]);
                        }
                    }
                }
                combine_if_last<T, D>(args, tile, &shared.last);
            }
            __syncwarp();
            if (elected) {
                mbarrier_arrive(q_empty);
            }
        };

        // --- P V of the last block, and S of the next tile's first, under way while the output is stored -------------
        wait_full();
        wgmma_fence();
        issue_output();
        const int v_slot = place.slot;
        place.next();
        q_place.next();
        if constexpr (Shape::kQSlots > 1) {
            // Past the last tile S is made of what lies there, since the compiler wants no branch around it.
            more = wait_tile();
            if (more) {
                wait_full();
            }
            wgmma_fence();
            issue_scores(q_place.slot);
            wgmma_wait<1>();
            wgmma_hold(o);
            release(v_slot);
            store();
        } else {
            wgmma_wait<0>();
            wgmma_hold(o);
            release(v_slot);
            store();
            more = wait_tile();
            if (more) {
                wait_full();
            }
            wgmma_fence();
            issue_scores(q_place.slot);
        }
    }
    wgmma_wait<0>();
    wgmma_hold(s);
}

// Warpgroup 0 is the producer (one warp of it), the others consume.
template <typename T, int D, bool kSoftCap>
__global__ void __launch_bounds__(Sm90Shape<D>::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ Sm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = Sm90Shape<D>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Sm90Shared<D>& shared = *reinterpret_cast<Sm90Shared<D>*>(shared_bytes);
    static_assert(sizeof(Sm90Shared<D>) == Shape::kSharedBytes && Shape::kSharedBytes <= 227 * 1024);

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.q_map);
        tma_prefetch_map(args.k_map);
        tma_prefetch_map(args.v_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), Shape::kConsumers * 4);
        }
        for (int i = 0; i < Shape::kQSlots; ++i) {
            mbarrier_init(shared_address(&shared.tile_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]), Shape::kConsumers * 4 + Shape::kLoaders);
        }
        for (int i = 0; i < Shape::kLoaders; ++i) {
            mbarrier_init(shared_address(&shared.tail[i]), 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    pdl_wait();
    pdl_launch_dependents();  // the decode items of this call, which do not wait for this kernel (attention.cu)

    const int num_tiles = args.a.p.work_map[1] * args.a.p.num_kv_heads;
    const int participants = min(num_tiles, min(static_cast<int>(gridDim.x), args.a.p.work_map[3]));
    if (static_cast<int>(blockIdx.x) >= participants) {
        return;
    }
    if (threadIdx.x < 128) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known to be the same for all lanes
        if (warp == 0) {
            produce_tiles<D>(args, shared, num_tiles, participants);
        } else {
            produce_keys<D>(args, shared, warp);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        consume<T, D, kSoftCap>(args, shared);
    }
#endif
}

}  // namespace

template <typename T, int D>
void attention_sm90_head(const Sm90Args& args, int num_blocks, void* stream) {
    launch(args.a.p.soft_cap > 0.0f ? attention_sm90_kernel<T, D, true> : attention_sm90_kernel<T, D, false>,
           {.grid = dim3(num_blocks),
            .block = dim3(Sm90Shape<D>::kThreads),
            .shared_bytes = Sm90Shape<D>::kSharedBytes,
            .pdl = true},
           stream, args);
}

}  // namespace fastkernels
