// The consumers of attention_fp8_sm90: a warpgroup has 64 rows.
#pragma once

#include "attention/attention_fp8_sm90_shared.cuh"
#include "attention/attention_sm90_consumer.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/wgmma_e4m3.cuh"

namespace fastkernels {
namespace {

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

}  // namespace
}  // namespace fastkernels
