// A consumer warpgroup of attention_sm90: 64 rows of every tile, from scores to output.
#pragma once

#include "attention/attention_sm90_shared.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/rcp.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/wgmma.cuh"

namespace fastkernels {
namespace {

constexpr float kNegInf = -INFINITY;

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

// Out: the dtype of the output. The products are of it too, or of fp16 where keys come as bytes.
template <typename Out, bool kSoftCap, typename Shape>
__device__ __forceinline__ void consume(const Sm90Args& args, Sm90Shared<Shape>& shared) {
    using T = std::conditional_t<Shape::kWidens, fp16, Out>;
    constexpr int D = Shape::kHeadDim, kKeys = Shape::kKeys, kConsumers = Shape::kConsumers;
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
        const float exponent = Shape::kWidens && !kSoftCap ? a.exponent * tile.k_scale : a.exponent;
        const auto weigh = [&](auto masked, int block) {
            if constexpr (kSoftCap) {
                cap_scores(s, Shape::kWidens ? a.tanh_exponent * tile.k_scale : a.tanh_exponent);
            }
            if constexpr (decltype(masked)::value) {
                const int first[2] = {row_first[0] - block * kKeys, row_first[1] - block * kKeys};
                const int last[2] = {row_last[0] - block * kKeys, row_last[1] - block * kKeys};
                mask_scores(s, first, last);
            }
            return softmax<decltype(masked)::value>(s, rows, correction, exponent);
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
        if constexpr (!kSoftCap || D == 96 || D == 128) {  // the others lack the registers: all steps mask
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
            const float v_scale = Shape::kWidens && p.v_scale != nullptr ? p.v_scale[tile.kv_head] : 1.0f;
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                rows.sum[half] += __shfl_xor_sync(0xffffffffu, rows.sum[half], 1);
                rows.sum[half] += __shfl_xor_sync(0xffffffffu, rows.sum[half], 2);
                scale[half] = rows.sum[half] > 0.0f ? v_scale * rcp_approx(rows.sum[half]) : 0.0f;
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
                    stmatrix_x4(address, pack_pair<Out>(x[0] * scale[0], x[1] * scale[0]),
                                pack_pair<Out>(x[2] * scale[1], x[3] * scale[1]),
                                pack_pair<Out>(x[4] * scale[0], x[5] * scale[0]),
                                pack_pair<Out>(x[6] * scale[1], x[7] * scale[1]));
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
                        *reinterpret_cast<uint4*>(out_row<Out>(args, tile, tile_row) + piece * 8) = x[i];
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
                                make_float2(o[n * 4 + half * 2] * v_scale, o[n * 4 + half * 2 + 1] * v_scale);
                        }
                        if (quad == 0) {
                            *reinterpret_cast<float2*>(partial + D) =
                                make_float2(rows.max[half] * exponent, rows.sum[half]);
                        }
                    }
                }
                combine_if_last<Out, D>(args, tile, &shared.last);
            }
            __syncwarp();
            if (kLanesArrive<Shape, kSoftCap> == 32 || elected) {
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

}  // namespace
}  // namespace fastkernels
