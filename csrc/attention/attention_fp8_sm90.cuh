// The prefill tiles of attention over e4m3 on Hopper: out = v_scale * softmax(scale * q_scale * k_scale * q k^T + mask)
// v
//
//   q [num_tokens, num_q_heads, 128]   k, v [num_keys, num_kv_heads, 128] or the pages of the KV cache   e4m3
//   out [num_tokens, num_q_heads, 128] bf16 | fp16   scales [num_kv_heads] fp32
//
// Tiles, masks and splits are those of attention_sm90.cuh: a block stays on each SM, a tile is 128 packed rows against
// the keys of a KV head, the last block of keys first. What differs:
//   V must come with the keys along its rows, so two warps of the producer turn every block over: ldmatrix transposes
//   pairs of bytes, byte permutes part the pairs, stmatrix writes them down. The order in which 16 keys then lie in a
//   row, 0 1 8 9 2 3 10 11 ..., is the one in which a lane's scores become the A operand of P V without leaving the
//   lane; the order of the rows, of 16 dimensions the even ones before the odd, meets no bank conflicts and gives a
//   lane four neighbouring elements of the output. Sums of products of fp8 keep some 13 bits (wgmma_e4m3.cuh). P V of a
//   block therefore goes to registers of its own, which are then added to O in fp32. They are the registers of S, part
//   by part: while one is added up the next is still being multiplied, and S of the next block has begun. Weights are
//   2^8 at most, so that those down to 2^-14 of a row's largest are normal numbers of e4m3. O is rescaled with every
//   block: the multiplication is part of the addition.
//
//   consumer A   P V lo | P V hi | S 2 | S 0 | S 1 |          softmax           | P V lo | ...
//                                   O lo  O hi
//   consumer B              softmax                | P V lo | P V hi | S 2 | S 0 | S 1 | ...
//
// FLOPs: 512 a row and key. Bytes from L2: the keys once a tile, 256 a key.
// Source: Shah et al. 2024 (FlashAttention-3), DeepSeek-AI 2024 (sums of fp8 in two levels).
#pragma once

#include "attention/attention_fp8_sm90.h"
#include "attention/attention_sm90_consumer.cuh"
#include "attention/attention_sm90_producer.cuh"
#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/wgmma_e4m3.cuh"

namespace fastkernels {
namespace {

struct Fp8Shape {
    static constexpr int kHeadDim = 128;
    static constexpr bool kWidens = false;  // bytes are multiplied as they come
    static constexpr int kConsumers = 2;    // warpgroups
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kRows = 64 * kConsumers;
    static constexpr int kKeys = 192;  // of a block, three times 64
    static constexpr int kParts = kKeys / 64;
    static constexpr int kPanelColumns = 128;
    static constexpr int kPanels = 1;
    static constexpr int kQBytes = kRows * kHeadDim;
    static constexpr int kSlotBytes = kKeys * kHeadDim;  // a block of K, of V, of V transposed
    static constexpr int kQSlots = 2;
    static constexpr int kSlots = 3;        // of K and of V
    static constexpr int kTurnedSlots = 2;  // of V transposed
    static constexpr int kTurners = 2;      // warps that transpose
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = 232;
};
static_assert(Fp8Shape::kRows == prefill_rows_sm90(Fp8Shape::kHeadDim, 1));
static_assert(Fp8Shape::kConsumers == Sm90Shape<Fp8Shape::kHeadDim>::kConsumers);  // combine_if_last

struct Fp8Shared {
    using Shape = Fp8Shape;
    alignas(1024) unsigned char q[Shape::kQSlots][Shape::kQBytes];
    alignas(1024) unsigned char keys[2][Shape::kSlots][Shape::kSlotBytes];  // K, V
    alignas(1024) unsigned char turned[Shape::kTurnedSlots][Shape::kSlotBytes];
    uint64_t full[2][Shape::kSlots], empty[2][Shape::kSlots];
    uint64_t turned_full[Shape::kTurnedSlots], turned_empty[Shape::kTurnedSlots];
    uint64_t tile_full[Shape::kQSlots], q_full[Shape::kQSlots], q_empty[Shape::kQSlots];
    Tile tiles[Shape::kQSlots];
    WorkItem item;  // of the tile that warp 0 prepares
    int last;       // whether this block combines the tile's splits
};

// Warp 1: K and V of every block, the last block first. A lane loads a box of each.
__device__ __forceinline__ void produce_fp8_keys(const Sm90Args& args, Fp8Shared& shared) {
    using Shape = Fp8Shape;
    constexpr int kKeys = Shape::kKeys;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32, box_shift = args.box_shift, box_key = lane << box_shift;
    const bool paged = p.page_size > 0;

    Place<Shape::kQSlots> tile_place;
    Place<Shape::kSlots> place;
    for (;; tile_place.next()) {
        mbarrier_wait(shared_address(&shared.tile_full[tile_place.slot]), tile_place.parity);
        const Tile& tile = shared.tiles[tile_place.slot];
        if (tile.rows == 0) {
            break;
        }
        const int32_t* pages = paged ? p.page_table + tile.seq * p.page_table_seq_stride : nullptr;
        const auto look_up = [&](int block) {  // the row of this lane's boxes
            const int key = tile.begin + block * kKeys + box_key;
            if (!paged) {
                return tile.k_begin + key;
            }
            if (block < 0 || key >= tile.len_k || box_key >= kKeys) {
                return 0;
            }
            return static_cast<int>(static_cast<uint32_t>(pages[(key >> a.page_shift) * p.page_table_page_stride]) *
                                        a.page_rows +
                                    tile.kv_head * p.page_size + (key & (p.page_size - 1)));
        };
        int row = look_up(tile.num_blocks - 1);
#pragma unroll 1
        for (int block = tile.num_blocks - 1; block >= 0; --block) {
            const int next_row = look_up(block - 1);
            const int keys = tile.len_k - (tile.begin + block * kKeys);  // that the sequence has from here on
            const int boxes = max(0, min(kKeys, keys + (1 << box_shift) - 1)) >> box_shift;
#pragma unroll
            for (int is_v = 0; is_v < 2; ++is_v) {
                const uint32_t full = shared_address(&shared.full[is_v][place.slot]);
                mbarrier_wait(shared_address(&shared.empty[is_v][place.slot]), place.parity ^ 1);
                if (lane == 0) {
                    mbarrier_arrive_expect_bytes(full, boxes << box_shift << 7);
                }
                __syncwarp();
                if (lane < boxes) {
                    tma_load(shared_address(shared.keys[is_v][place.slot]) + box_key * 128,
                             is_v ? args.v_map : args.k_map, 0, paged ? 0 : tile.kv_head, row, full);
                }
            }
            row = next_row;
            place.next();
        }
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        }
    }
}

// Warps 2 and 3: V of every block, transposed, 64 of its dimensions each. Of 16 dimensions the even ones make the first
// 8 rows; of 16 keys a row has 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. Keys past the end become zeros, since 0 x NaN is
// NaN and other sequences' or stale keys may lie there.
__device__ __forceinline__ void turn_values(const Sm90Args& args, Fp8Shared& shared, int half) {
    using Shape = Fp8Shape;
    constexpr int kKeys = Shape::kKeys, kHeadDim = Shape::kHeadDim, kChunks = kHeadDim / 16 / Shape::kTurners;
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    // Lane addresses within a slot (common/ptx/ldmatrix.cuh): read are 32 keys of 16 dimensions, written are the even
    // and the odd dimensions of the first 16 keys, then of the others.
    uint32_t read[kChunks], write[2];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        read[chunk] = lane * 128 + ((half * kChunks + chunk) ^ r) * 16;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        write[i] = (half * kChunks * 16 + matrix % 2 * 8 + r) * 64 + ((i * 2 + matrix / 2) ^ r / 2) * 16;
    }

    Place<Shape::kQSlots> tile_place;
    Place<Shape::kSlots> place;
    Place<Shape::kTurnedSlots> turned_place;
    for (;; tile_place.next()) {
        mbarrier_wait(shared_address(&shared.tile_full[tile_place.slot]), tile_place.parity);
        const Tile& tile = shared.tiles[tile_place.slot];
        if (tile.rows == 0) {
            break;
        }
#pragma unroll 1
        for (int block = tile.num_blocks - 1; block >= 0; --block) {
            const int keys = tile.len_k - (tile.begin + block * kKeys);
            const uint32_t from = shared_address(shared.keys[1][place.slot]);
            const uint32_t to = shared_address(shared.turned[turned_place.slot]);
            mbarrier_wait(shared_address(&shared.full[1][place.slot]), place.parity);
            mbarrier_wait(shared_address(&shared.turned_empty[turned_place.slot]), turned_place.parity ^ 1);
            const auto turn = [&](auto clears) {
#pragma unroll
                for (int j = 0; j < kKeys / 32 * kChunks; j += 2) {  // two at a time: registers are scarce
                    uint32_t pairs[2][4];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        ldmatrix_x4_trans(pairs[e], from + read[(j + e) % kChunks] + (j + e) / kChunks * (32 * 128));
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int i = (j + e) / kChunks, chunk = (j + e) % kChunks;
                        uint32_t (&x)[4] = pairs[e];
                        if constexpr (decltype(clears)::value) {
#pragma unroll
                            for (int m = 0; m < 4; ++m) {
                                const int left = keys - (i * 32 + m * 8 + lane % 4 * 2);
                                x[m] &= left >= 2 ? 0xffffffffu : left == 1 ? 0x0000ffffu : 0u;
                            }
                        }
                        stmatrix_x4(to + i / 2 * (kHeadDim * 64) + write[i % 2] + chunk * (16 * 64),
                                    permute_bytes(x[0], x[1], 0x6420), permute_bytes(x[0], x[1], 0x7531),
                                    permute_bytes(x[2], x[3], 0x6420), permute_bytes(x[2], x[3], 0x7531));
                    }
                }
            };
            if (keys >= kKeys) {
                turn(std::false_type{});
            } else {
                turn(std::true_type{});
            }
            fence_async_shared();
            __syncwarp();
            if (lane == 0) {
                mbarrier_arrive(shared_address(&shared.empty[1][place.slot]));
                mbarrier_arrive(shared_address(&shared.turned_full[turned_place.slot]));
            }
            place.next();
            turned_place.next();
        }
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        }
    }
}

constexpr float kLargestWeight = 8.0f;  // its logarithm

// Four weights, as bytes.
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t packed;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}

// The largest score of 64 keys and of what was seen before.
__device__ __forceinline__ void raise_max(const float (&s)[32], float (&max)[2]) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        float& m = max[i / 2 % 2];
        m = fmaxf(m, fmaxf(s[i], s[i + 1]));
    }
}

// The weights of 64 keys, 2^(exponent * S - shift), as the A operand of P V, and their sums.
__device__ __forceinline__ void weigh(float (&s)[32], const float (&shift)[2], float exponent, float (&sum)[2],
                                      uint32_t (&weights)[2][4]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        s[i] = exp2_approx(fmaf(s[i], exponent, -shift[i / 2 % 2]));
        sum[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* x = s + i * 16 + j / 2 * 8 + j % 2 * 2;
            weights[i][j] = pack_e4m3(x[0], x[1], x[4], x[5]);
        }
    }
}

// The lane's four neighbouring elements of the output, from column 16 * i + 4 * (lane % 4).
__device__ __forceinline__ float4 four_of(const float (&o)[2][32], int i, int half, float scale) {
    const float* x = o[i / 4] + i % 4 * 8 + half * 2;
    return make_float4(x[0] * scale, x[4] * scale, x[1] * scale, x[5] * scale);
}

template <typename T>
__device__ __forceinline__ void store_fp8(const Sm90Args& args, Fp8Shared& shared, const Tile& tile,
                                          const float (&o)[2][32], RowState& rows, float exponent, int row, int quad) {
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    constexpr int kHeadDim = Fp8Shape::kHeadDim;
    const float v_scale = p.v_scale != nullptr ? p.v_scale[tile.kv_head] : 1.0f;
    const bool skipped = p.page_size > 0 && tile.len_k == 0, whole = tile.num_splits == 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int r = row + half * 8;
        if (r >= tile.rows) {
            continue;
        }
        if (whole && !skipped) {
            const float scale = sum > 0.0f ? v_scale * rcp_approx(sum) : 0.0f;
            T* out = out_row<T>(args, tile, r) + quad * 4;
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                const float4 x = four_of(o, i, half, scale);
                *reinterpret_cast<uint2*>(out + i * 16) = make_uint2(pack_pair<T>(x.x, x.y), pack_pair<T>(x.z, x.w));
            }
        } else if (!whole) {
            float* partial = partial_row<kHeadDim>(a, tile, tile.split, r);
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                *reinterpret_cast<float4*>(partial + i * 16 + quad * 4) = four_of(o, i, half, v_scale);
            }
            if (quad == 0) {
                *reinterpret_cast<float2*>(partial + kHeadDim) = make_float2(rows.max[half] * exponent, sum);
            }
        }
    }
    if (!whole) {
        combine_if_last<T, kHeadDim>(args, tile, &shared.last);
    }
}

template <typename T, bool kSoftCap>
__device__ __forceinline__ void consume_fp8(const Sm90Args& args, Fp8Shared& shared) {
    using Shape = Fp8Shape;
    constexpr int kKeys = Shape::kKeys, kParts = Shape::kParts;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / 128 - 1, 0), warp = threadIdx.x / 32 % 4,
              lane = threadIdx.x % 32;
    const int quad = lane % 4, row = consumer * 64 + warp * 16 + lane / 4;  // and row + 8
    const bool elected = lane == 0;

    Place<Shape::kQSlots> q_place;
    Place<Shape::kSlots> k_place;
    Place<Shape::kTurnedSlots> v_place;
    if (consumer == 0) {
        named_barrier_arrive(kTurnBarrier, 256);  // the first turn
    }
    uint32_t q[4][4], weights[kParts][2][4];
    float x[kParts][32];  // S, 64 keys each; then P V of the block, dimensions 0 to 63 and 64 to 127
    float o[2][32];

    const auto release = [&](uint64_t* barrier) {
        if (elected) {
            mbarrier_arrive(shared_address(barrier));
        }
    };
    const auto issue_scores = [&](int part) {
        const uint64_t k = wgmma_k_major(shared_address(shared.keys[0][k_place.slot])) + part * (64 * 128 / 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            wgmma_e4m3_n64(x[part], q[i], k + i * 2, i > 0);
        }
        wgmma_commit();
    };
    const auto issue_output = [&](int half) {
        const uint64_t v = wgmma_k_major_64(shared_address(shared.turned[v_place.slot])) + half * (64 * 64 / 16);
#pragma unroll
        for (int i = 0; i < kKeys / 32; ++i) {
            wgmma_e4m3_n64(x[half], weights[i / 2][i % 2], v + i / 2 * (Shape::kHeadDim * 64 / 16) + i % 2 * 2, i > 0);
        }
        wgmma_commit();
    };
    float correction[2];
    const auto add_output = [&](int half) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            o[half][i] = fmaf(o[half][i], correction[i / 2 % 2], x[half][i]);
        }
    };
    const auto load_q = [&] {
        const uint32_t from = shared_address(shared.q[q_place.slot]) + (consumer * 64 + warp * 16 + lane % 16) * 128;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ldmatrix_x4(q[i], from + ((i * 2 + lane / 16) ^ lane % 8) * 16);
        }
    };

    // --- What a tile brings ------------------------------------------------------------------------------------------
    RowState rows;
    int row_first[2], row_last[2];  // keys [first, last) that the lane's rows see, from its first column of keys
    int mask_from, mask_below;      // blocks at and past the causal edge or the end, and before the window's
    int block;
    float exponent, tanh_exponent;
    const auto begin_tile = [&] {
        const Tile& tile = shared.tiles[q_place.slot];
        const int begin = tile.begin, end = tile.end;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = tile.first_position + args.token_of(row + half * 8);
            row_last[half] = (p.causal ? min(end, position + 1) : end) - begin - quad * 2;
            row_first[half] = (p.window > 0 ? position - p.window + 1 : 0) - begin - quad * 2;
            rows.max[half] = kNegInf;
            rows.sum[half] = 0.0f;
        }
        mask_from = max(0, (p.causal ? min(end, tile.first_position + 1) : end) - begin) / kKeys;
        mask_below = p.window > 0 ? max(0, tile.last_position - p.window + kKeys - begin) / kKeys : 0;
        block = tile.num_blocks - 1;
        float score_scale = p.q_scale != nullptr ? p.q_scale[tile.kv_head] : 1.0f;
        score_scale *= p.k_scale != nullptr ? p.k_scale[tile.kv_head] : 1.0f;
        exponent = kSoftCap ? a.exponent : a.exponent * score_scale;
        tanh_exponent = a.tanh_exponent * score_scale;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            o[i / 32][i % 32] = 0.0f;
        }
    };

    mbarrier_wait(shared_address(&shared.q_full[0]), 0);  // a block that runs has a tile
    load_q();
    mbarrier_wait(shared_address(&shared.full[0][0]), 0);
    wgmma_fence();
    issue_scores(2);
    issue_scores(0);
    issue_scores(1);
    begin_tile();
    for (bool more = true; more;) {
        // --- The weights of a block of keys, in the order in which S arrives -----------------------------------------
        const bool masks = block >= mask_from || block < mask_below;
        float max[2] = {rows.max[0], rows.max[1]};
        const auto take_scores = [&](int part) {
            wgmma_hold(x[part]);
            if constexpr (kSoftCap) {
                cap_scores(x[part], tanh_exponent);
            }
            if (masks) {
                const int from = block * kKeys + part * 64;
                const int first[2] = {row_first[0] - from, row_first[1] - from};
                const int last[2] = {row_last[0] - from, row_last[1] - from};
                mask_scores(x[part], first, last);
            }
            raise_max(x[part], max);
        };
        wgmma_wait<0>();
        release(&shared.empty[0][k_place.slot]);
        k_place.next();
        take_scores(2);
        take_scores(0);
        take_scores(1);
        float shift[2], sum[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            max[half] = fmaxf(max[half], __shfl_xor_sync(0xffffffffu, max[half], 1));
            max[half] = fmaxf(max[half], __shfl_xor_sync(0xffffffffu, max[half], 2));
            const float finite = max[half] == kNegInf ? 0.0f : max[half];  // no key seen yet
            correction[half] = exp2_approx((rows.max[half] - finite) * exponent);
            shift[half] = fmaf(finite, exponent, -kLargestWeight);
            rows.max[half] = max[half];
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            weigh(x[part], shift, exponent, sum, weights[part]);
        }
        rows.sum[0] = rows.sum[0] * correction[0] + sum[0];
        rows.sum[1] = rows.sum[1] * correction[1] + sum[1];

        // --- P V of the block, and S of the next or of the next tile's first -----------------------------------------
        const bool last = block == 0;
        const int q_slot = q_place.slot;
        mbarrier_wait(shared_address(&shared.turned_full[v_place.slot]), v_place.parity);
        named_barrier_sync(kTurnBarrier + consumer, 256);
        wgmma_fence();
        issue_output(0);
        issue_output(1);
        if (last) {
            q_place.next();
            mbarrier_wait(shared_address(&shared.q_full[q_place.slot]), q_place.parity);
            more = shared.tiles[q_place.slot].rows > 0;
            load_q();
        }
        if (more) {  // past the last tile S is made of what lies there, since the compiler wants no branch around it
            mbarrier_wait(shared_address(&shared.full[0][k_place.slot]), k_place.parity);
        }
        wgmma_fence();
        issue_scores(2);
        wgmma_wait<2>();
        wgmma_hold(x[0]);
        add_output(0);
        wgmma_fence();
        issue_scores(0);
        wgmma_wait<2>();
        wgmma_hold(x[1]);
        release(&shared.turned_empty[v_place.slot]);
        v_place.next();
        add_output(1);
        wgmma_fence();
        issue_scores(1);
        named_barrier_arrive(kTurnBarrier + (1 - consumer), 256);
        --block;
        if (last) {
            store_fp8<T>(args, shared, shared.tiles[q_slot], o, rows, exponent, row, quad);
            __syncwarp();
            release(&shared.q_empty[q_slot]);
            if (more) {
                begin_tile();
            }
        }
    }
    wgmma_wait<0>();
    wgmma_hold(x[0]);
    wgmma_hold(x[1]);
    wgmma_hold(x[2]);
}

// Warpgroup 0 is the producer, the others consume.
template <typename T, bool kSoftCap>
__global__ void __launch_bounds__(Fp8Shape::kThreads, 1)
    attention_fp8_sm90_kernel(const __grid_constant__ Sm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = Fp8Shape;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Fp8Shared& shared = *reinterpret_cast<Fp8Shared*>(shared_bytes);
    static_assert(sizeof(Fp8Shared) <= 227 * 1024);

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.q_map);
        tma_prefetch_map(args.k_map);
        tma_prefetch_map(args.v_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[0][i]), 1);
            mbarrier_init(shared_address(&shared.full[1][i]), 1);
            mbarrier_init(shared_address(&shared.empty[0][i]), Shape::kConsumers * 4);
            mbarrier_init(shared_address(&shared.empty[1][i]), Shape::kTurners);
        }
        for (int i = 0; i < Shape::kTurnedSlots; ++i) {
            mbarrier_init(shared_address(&shared.turned_full[i]), Shape::kTurners);
            mbarrier_init(shared_address(&shared.turned_empty[i]), Shape::kConsumers * 4);
        }
        for (int i = 0; i < Shape::kQSlots; ++i) {
            mbarrier_init(shared_address(&shared.tile_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]), Shape::kConsumers * 4 + 1 + Shape::kTurners);
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
            produce_tiles(args, shared, num_tiles, participants);
        } else if (warp == 1) {
            produce_fp8_keys(args, shared);
        } else {
            turn_values(args, shared, warp - 2);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        consume_fp8<T, kSoftCap>(args, shared);
    }
#endif
}

}  // namespace
}  // namespace fastkernels
