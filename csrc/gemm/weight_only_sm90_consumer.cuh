// A consumer warpgroup of weight_only_sm90: unpacks W, multiplies, and hands the sums on to whoever stores them.
#pragma once

#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/wgmma_rs.cuh"
#include "gemm/weight_only_sm90_producer.cuh"

namespace fastkernels {
namespace {

template <typename T, typename F, int kN>
struct WeightTileConsumer {
    using Shape = WeightTileShape<F, kN>;
    using X = std::conditional_t<kTakesE4m3<F>, __nv_fp8_e4m3, T>;
    static constexpr int kSums = kN / 2;
    static constexpr int kUnits16 = kN / 16, kOutUnits = Shape::kOutUnits;  // of tokens
    static constexpr int kSteps = 64 * int{sizeof(X)} / 32;                 // wgmmas of 64 neighbours
    // Sums that a scale multiplies before they are added are the wgmmas' of kPart steps. They take registers of their
    // own, so that 256 tokens take turns by 128.
    static constexpr bool kScales = F::kScaleSteps != 0;
    static constexpr int kPart = F::kScaleSteps * kSteps / 2;
    static constexpr int kPartTokens = kN == 256 && kScales ? 128 : kN, kTurns = kN / kPartTokens;
    static constexpr int kPartSums = kPartTokens / 2;

    const WeightOnlyTileArgs& args;
    WeightTileShared<Shape>& shared;
    const int team, group, warp, lane;  // group: the warpgroup of the team
    const InOrder order;
    WeightRingPlace<Shape::kSlots> ring;

    __device__ __forceinline__ const char* unit(int slot) const {
        return shared.weight[slot] + (group * 4 + warp) * Shape::kUnitBytes;
    }

    __device__ __forceinline__ void wait_full() const {
        mbarrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    }

    __device__ __forceinline__ void release(int slot) const {
        mbarrier_arrive(shared_address(&shared.empty[slot]));
    }

    // The registers are ready here, and not where they are used.
    __device__ __forceinline__ void unpack(uint32_t (&a)[kSteps][4], int slot, int half) const {
        Half words;
        F::load_half(words, unit(slot), half, order);
#pragma unroll
        for (int m = 0; m < kSteps; ++m) {
            F::template unpack_operand<T>(words, m, order, a[m]);
            wgmma_hold(a[m]);
        }
    }

    // part (+)= operands kFrom to kTo - 1 of a half, for the tokens of a turn; kFirst: a part begins.
    template <int kFrom, int kTo, bool kFirst, int kSize>
    __device__ __forceinline__ void issue(float (&part)[kSize], const uint32_t (&a)[kSteps][4], int slot, int half,
                                          int turn = 0) const {
        const int panel = Shape::kPanels == 2 ? half * Shape::kPanelBytes : half * 64;
        const uint64_t b = wgmma_k_major(shared_address(shared.x[slot])) + ((panel + turn * kPartTokens * 128) >> 4);
        wgmma_fence();
#pragma unroll
        for (int m = kFrom; m < kTo; ++m) {
            wgmma_rs_k_major<X, kSize * 2>(part, a[m], b + m * (32 >> 4), !(kFirst && m == kFrom));
        }
        wgmma_commit();
    }

    // sum = W x^T of this team's chunks of a tile, the next num_chunks in the ring.
    __device__ __forceinline__ void multiply(float (&sum)[kSums], int num_chunks) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            sum[i] = 0.0f;
        }
        uint32_t even[kSteps][4], odd[kSteps][4];  // operands of the halves of a chunk
        int i = min(team, num_chunks);
        ring.advance(i);
        if (i < num_chunks) {
            wait_full();
            unpack(even, ring.slot, 0);
        }
        if constexpr (kScales) {
            add_scaled(sum, even, odd, i, num_chunks);
        } else {
            add_up(sum, even, odd, i, num_chunks);
        }
    }

    __device__ __forceinline__ int advance(int i, int num_chunks) {
        const int next = min(i + Shape::kTeams, num_chunks);
        ring.advance(next - i);
        return next;
    }

    __device__ __forceinline__ void unpack_odd(uint32_t (&odd)[kSteps][4], int slot, uint32_t parity) const {
        // Passes at once. Without a branch here the compiler puts the unpacking in the middle of the wgmmas before it,
        // and the tensor cores wait.
        mbarrier_wait(shared_address(&shared.full[slot]), parity);
        unpack(odd, slot, 1);
    }

    // All in the wgmmas' own sums, which are never waited for but at the end.
    __device__ __forceinline__ void add_up(float (&sum)[kSums], uint32_t (&even)[kSteps][4], uint32_t (&odd)[kSteps][4],
                                           int i, int num_chunks) {
        int last = -1;  // slot of the chunk before
        while (i < num_chunks) {
            const int slot = ring.slot;
            const uint32_t parity = ring.parity;
            i = advance(i, num_chunks);
            issue<0, kSteps, false>(sum, even, slot, 0);
            wgmma_wait<1>();
            if (last >= 0) {
                release(last);
            }
            last = slot;
            unpack_odd(odd, slot, parity);
            issue<0, kSteps, false>(sum, odd, slot, 1);
            wgmma_wait<1>();
            if (i < num_chunks) {
                wait_full();
                unpack(even, ring.slot, 0);
            }
        }
        wgmma_wait<0>();
        wgmma_hold(sum);
        if (last >= 0) {
            release(last);
        }
    }

    __device__ __forceinline__ void await_part(float (&part)[kPartSums]) const {
        wgmma_wait<0>();
        wgmma_hold(part);
    }

    __device__ __forceinline__ void add(float (&sum)[kSums], const float (&part)[kPartSums], float2 scale,
                                        int turn = 0) const {
#pragma unroll
        for (int i = 0; i < kPartSums; ++i) {
            float& to = sum[turn * kPartSums + i];
            to = fmaf(part[i], i % 4 < 2 ? scale.x : scale.y, to);
        }
    }

    // Parts of their own, which scales multiply.
    __device__ __forceinline__ void add_scaled(float (&sum)[kSums], uint32_t (&even)[kSteps][4],
                                               uint32_t (&odd)[kSteps][4], int i, int num_chunks) {
        constexpr int kParts = 2 * kSteps / kPart;
        static_assert(kTurns == 1 || kParts == 1);
        float part[kPartSums];
        while (i < num_chunks) {
            const int slot = ring.slot;
            const uint32_t parity = ring.parity;
            float2 scale[kParts];
#pragma unroll
            for (int of = 0; of < kParts; ++of) {
                scale[of] = F::scale(unit(slot) + F::kPieces * 512, of, order.g);
            }
            i = advance(i, num_chunks);
            const auto unpack_next = [&] {
                if (i < num_chunks) {
                    wait_full();
                    unpack(even, ring.slot, 0);
                }
            };
            const auto finish = [&](float2 of, int turn = 0) {
                await_part(part);
                add(sum, part, of, turn);
            };
            if constexpr (kParts == 1) {
                issue<0, kSteps, true>(part, even, slot, 0);
                unpack_odd(odd, slot, parity);
                issue<0, kSteps, false>(part, odd, slot, 1);
#pragma unroll
                for (int turn = 1; turn < kTurns; ++turn) {
                    finish(scale[0], turn - 1);
                    issue<0, kSteps, true>(part, even, slot, 0, turn);
                    issue<0, kSteps, false>(part, odd, slot, 1, turn);
                }
                wgmma_wait<1>();
                unpack_next();
            } else if constexpr (kParts == 2) {
                issue<0, kSteps, true>(part, even, slot, 0);
                unpack_odd(odd, slot, parity);
                finish(scale[0]);
                issue<0, kSteps, true>(part, odd, slot, 1);
                unpack_next();
            } else {
                constexpr int kMiddle = kSteps / 2;
                issue<0, kMiddle, true>(part, even, slot, 0);
                unpack_odd(odd, slot, parity);
                finish(scale[0]);
                issue<kMiddle, kSteps, true>(part, even, slot, 0);
                finish(scale[1]);
                issue<0, kMiddle, true>(part, odd, slot, 1);
                unpack_next();
                finish(scale[2]);
                issue<kMiddle, kSteps, true>(part, odd, slot, 1);
            }
            await_part(part);
            release(slot);
            add(sum, part, scale[kParts - 1], kTurns - 1);
        }
    }

    __device__ __forceinline__ void sync_group() const {
        named_barrier_sync(1 + group, 128);  // of the first team
    }

    // The scales of a tile's tokens, to where stage() finds them once the group has met again.
    __device__ __forceinline__ void bring_scales(int64_t token) const {
        if (kTakesE4m3<F> && team == 0) {
            sync_group();  // those of the tile before have been read
            for (int i = threadIdx.x % 128; i < kN; i += 128) {
                shared.x_scales[group][i] = token + i < args.p.num_tokens ? args.p.x_scales[token + i] : 0.0f;
            }
        }
    }

    // The sums of the tile's 16 tokens from `first` on, to this warp's unit of `out`: 32 bytes a token, whose halves
    // change places every 4 tokens, so that no bank is met twice.
    __device__ __forceinline__ void stage(const float (&d)[8], const float (&factor)[2], const float (&more)[2],
                                          int first, int unit) const {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 of_token{factor[i % 2], factor[i % 2]};
            if constexpr (kTakesE4m3<F>) {
                const float* scales = shared.x_scales[group] + first + i / 2 * 8 + lane % 4 * 2;
                const float2 scale = *reinterpret_cast<const float2*>(scales);
                of_token.x *= scale.x;
                of_token.y *= scale.y;
            }
            pairs[i] =
                pack_pair<T>(fmaf(d[i * 2], of_token.x, more[i % 2]), fmaf(d[i * 2 + 1], of_token.y, more[i % 2]));
        }
        const int token = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
        stmatrix_x4_transposed(
            shared_address(shared.out[group * 4 + warp][unit]) + token * 32 + (half ^ token / 4 % 2) * 16, pairs[0],
            pairs[1], pairs[2], pairs[3]);
    }

    // What the warp has staged there, by lanes that each have 8 rows of a token.
    __device__ __forceinline__ void write(int64_t token, int64_t row, int unit) const {
        const WeightOnlyParams& p = args.p;
        const int of = lane / 2, half = lane % 2;
        const auto piece =
            reinterpret_cast<const uint4*>(shared.out[group * 4 + warp][unit] + of * 32 + (half ^ of / 4 % 2) * 16);
        token += of;
        row += warp * 16 + half * 8;
        if (token < p.num_tokens) {
            T* out = static_cast<T*>(p.out) + token * p.out_token_stride + row;
            if (args.wide_out && row + 8 <= p.out_size) {
                *reinterpret_cast<uint4*>(out) = *piece;
            } else {
                for (int i = 0; i < 8 && row + i < p.out_size; ++i) {
                    out[i] = reinterpret_cast<const T*>(piece)[i];
                }
            }
        }
    }

    __device__ __forceinline__ int thread() const {  // of the team
        return group * 128 + static_cast<int>(threadIdx.x) % 128;
    }

    // The second team hands its sums to the first. True for the first.
    __device__ __forceinline__ bool add_teams(float (&sum)[kSums], bool of_cluster) const {
        if constexpr (Shape::kTeams == 2) {
            float4* meet = reinterpret_cast<float4*>(shared.meet) + thread();  // [kSums / 4][256]
            if (team == 1) {
#pragma unroll
                for (int i = 0; i < kSums / 4; ++i) {
                    meet[i * 256] = make_float4(sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]);
                }
            }
            named_barrier_sync(5 + group, 256);
            if (team == 0) {
#pragma unroll
                for (int i = 0; i < kSums / 4; ++i) {
                    const float4 more = meet[i * 256];
                    sum[i * 4] += more.x;
                    sum[i * 4 + 1] += more.y;
                    sum[i * 4 + 2] += more.z;
                    sum[i * 4 + 3] += more.w;
                }
            }
            named_barrier_sync(7 + group, 256);  // they have been read
            if (team == 1 && of_cluster) {
                named_barrier_arrive(9, Shape::kConsumers * 128);
            }
            return team == 0;
        }
        return true;
    }

    __device__ __forceinline__ void run() {
        const WeightOnlyParams& p = args.p;
        for (WeightTileWalk walk(args); !walk.ended(); walk.next()) {
            int rows, token_tile;
            walk.place(kN, rows, token_tile);
            const int64_t row = static_cast<int64_t>(rows) * kWeightTileRows + group * 64;
            const int64_t token = static_cast<int64_t>(token_tile) * kN;
            float factor[2], more[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t n = min(row + warp * 16 + order.g + half * 8, p.out_size - 1);
                factor[half] = p.row_factors[n] * F::template kLeftOut<T>;
                more[half] = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[n]);
            }
            bring_scales(token);
            float sum[kSums];
            multiply(sum, walk.num_chunks);
            if (!add_teams(sum, walk.shared)) {
                continue;
            }
            if (kTakesE4m3<F>) {
                sync_group();
            }
            if (!walk.shared) {
#pragma unroll
                for (int i = 0; i < kUnits16; ++i) {
                    const float* d = sum + i * 8;
                    stage({d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]}, factor, more, i * 16, i % kOutUnits);
                    if (i % kOutUnits == kOutUnits - 1) {
                        __syncwarp();
#pragma unroll
                        for (int unit = 0; unit < kOutUnits; ++unit) {
                            write(token + (i / kOutUnits * kOutUnits + unit) * 16, row, unit);
                        }
                        __syncwarp();
                    }
                }
                continue;
            }
            // The block's last tile. Its ring is done with once all warpgroups are.
            float4* kept = reinterpret_cast<float4*>(shared.x) + thread();  // [kSums / 4][256]
            named_barrier_sync(9, Shape::kConsumers * 128);
#pragma unroll
            for (int i = 0; i < kSums / 4; ++i) {
                kept[i * 256] = make_float4(sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]);
            }
            cluster_sync();
            const int rank = cluster_rank();
            for (int i = kUnits16 * rank / args.cluster; i < kUnits16 * (rank + 1) / args.cluster; ++i) {
                float d[8] = {};
                for (int other = 0; other < args.cluster; ++other) {
                    const float4 x = *in_block(kept + i * 512, other), y = *in_block(kept + i * 512 + 256, other);
                    const float both[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        d[e] += both[e];
                    }
                }
                stage(d, factor, more, i * 16, 0);
                __syncwarp();
                write(token + i * 16, row, 0);
                __syncwarp();
            }
        }
        if (Shape::kTeams == 2 && team == 1 && shares_tile(args)) {
            cluster_sync();  // the first team's sums
        }
    }
};

}  // namespace
}  // namespace fastkernels
