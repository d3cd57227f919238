// out = x W^T + bias with W in 4 or 8 bits and x as it is, on Hopper: TMA, and wgmma with W as the operand in
// registers.
//
//   x [num_tokens, K]   W in units of 16 rows x 128 (weight_only.h)   bias [N]   out [num_tokens, N]   bf16 | fp16
//
// A tile is 128 rows of W times kN tokens. A block takes one after the other; those that are left over for a last
// round, or all where there are few, are for clusters, whose blocks share a tile's K.
//   Producer, a thread of each of 4 warps: chunks of 128 along K, 8 units of W by bulk copies and kN rows of x by TMA,
//   into a ring. What the ring holds of W is asked for before griddepcontrol.wait, while the kernel before this one
//   ends.
//   Consumers, 2 or 4 warpgroups of 64 rows: unpack 64 neighbours of W, the operands of four wgmmas, while others are
//   multiplied. Weights are the codes themselves, less their zero points, and exact; sums of a chunk or of a group
//   with a scale are multiplied by the scale and added in fp32.
// Out is transposed by way of shared memory, 16 tokens at a time. Where a cluster shares K, each block leaves its sums
// in its ring, and adds up those of its part of the tokens in the order of the blocks.
//
// FLOPs: 2 * K an element of out. Bytes: W once for kN tokens, from L2 but for the first; x once for 128 rows.
// Source: none; the roles are those of matmul_sm90.cuh.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/elect.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma_rs.cuh"
#include "gemm/weight_only_formats.cuh"
#include "gemm/weight_only_sm90.h"

namespace fastkernels {
namespace {

template <typename F, int kN>
struct WeightTileShape {
    // Of few tokens two teams of two warpgroups take chunks by turns, and so hide each other's latency.
    static constexpr int kTeams = kN <= 32 ? 2 : 1, kConsumers = kTeams * 2;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kUnits = kWeightTileRows / kUnitRows;
    static constexpr int kUnitBytes = F::kPieces * 512 + F::kScaleBytes;
    static constexpr int kPanelBytes = kN * 128;  // 64 elements of each token
    static constexpr int kXBytes = 2 * kPanelBytes, kWeightBytes = kUnits * kUnitBytes;
    static constexpr int kOutBytes = 16 * 128;  // 16 tokens, 64 rows; two in turn for each warpgroup
    static constexpr int kMeetBytes = kTeams == 2 ? kN * kWeightTileRows * 4 : 16;  // the second team's sums
    static constexpr int kMostBytes = 227 * 1024;
    static constexpr int kSlots =
        std::min(16, (kMostBytes - 2048 - 4 * kOutBytes - kMeetBytes) / (kXBytes + kWeightBytes));
    // A block has what it is launched with, the same for all threads, in eights.
    static constexpr int kProducerRegisters = kTeams == 2 ? 64 : 56, kConsumerRegisters = kTeams == 2 ? 104 : 224;
    static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                  (kConsumers + 1) * (65536 / kThreads / 8 * 8));
};

template <typename Shape>
struct WeightTileShared {
    alignas(1024) unsigned char x[Shape::kSlots][Shape::kXBytes];  // two panels
    alignas(1024) unsigned char out[2][2][Shape::kOutBytes];
    alignas(16) unsigned char meet[Shape::kMeetBytes];
    alignas(16) char weight[Shape::kSlots][Shape::kWeightBytes];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];
};

template <int kSlots>
struct WeightRingPlace {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int by) {  // at most kSlots
        slot += by;
        if (slot >= kSlots) {
            slot -= kSlots;
            parity ^= 1;
        }
    }
};

// The block's tiles, and its chunks of K of each.
struct WeightTileWalk {
    static constexpr int kGroup = 2048;  // tokens whose tiles take turns at the same rows, so that x stays in L2

    const WeightOnlyTileArgs& args;
    int tile, first_chunk = 0, num_chunks;
    bool shared = false;  // the tile, with the cluster's other blocks; it is the last

    __device__ __forceinline__ explicit WeightTileWalk(const WeightOnlyTileArgs& args)
        : args(args),
          tile(static_cast<int>(blockIdx.x)),
          num_chunks((static_cast<int>(args.p.in_size) + kUnitSize - 1) / kUnitSize) {
        settle();
    }
    __device__ __forceinline__ bool ended() const {
        return tile >= args.row_tiles * args.token_tiles;
    }
    __device__ __forceinline__ void next() {
        if (shared) {
            tile = args.row_tiles * args.token_tiles;
        } else {
            tile += static_cast<int>(gridDim.x);
            settle();
        }
    }
    // This block's tile of 128 rows, and the tile of kN tokens.
    __device__ __forceinline__ void place(int tokens, int& rows, int& token_tile) const {
        const int group = kGroup / tokens, first = tile / (group * args.row_tiles) * group;
        const int wide = min(args.token_tiles - first, group), index = tile - first * args.row_tiles;
        rows = index / wide;
        token_tile = first + index % wide;
    }

  private:
    __device__ __forceinline__ void settle() {
        if (tile >= args.whole_tiles && args.cluster > 1) {
            const int rank = cluster_rank(), begin = num_chunks * rank / args.cluster;
            shared = true;
            tile = args.whole_tiles + static_cast<int>(blockIdx.x) / args.cluster;
            first_chunk = begin;
            num_chunks = num_chunks * (rank + 1) / args.cluster - begin;
        }
    }
};

// Whether the cluster of this block has a tile to share.
__device__ __forceinline__ bool shares_tile(const WeightOnlyTileArgs& args) {
    return args.cluster > 1 &&
           args.whole_tiles + static_cast<int>(blockIdx.x) / args.cluster < args.row_tiles * args.token_tiles;
}

// --- Producer --------------------------------------------------------------------------------------------------------

// By one thread of each of the 4 warps.
template <typename Shape, int kN>
__device__ __forceinline__ void produce_weight_tiles(const WeightOnlyTileArgs& args, WeightTileShared<Shape>& shared,
                                                     int warp) {
    constexpr int kWarpUnits = Shape::kUnits / 4;
    const WeightOnlyParams& p = args.p;
    const int all_chunks = (static_cast<int>(p.in_size) + kUnitSize - 1) / kUnitSize;
    const int all_units = (static_cast<int>(p.out_size) + kUnitRows - 1) / kUnitRows;
    const int64_t row_bytes = static_cast<int64_t>(all_chunks) * Shape::kUnitBytes;
    const uint64_t policy = args.token_tiles == 1 ? kEvictFirst : kEvictNormal;

    const auto load_weight = [&](int slot, int rows, int chunk) {
        const int units = max(min(all_units - rows * Shape::kUnits, Shape::kUnits), 0);
        const uint32_t full = shared_address(&shared.full[slot]), to = shared_address(shared.weight[slot]);
        if (warp == 0) {  // of all warps, and x too
            mbarrier_arrive_expect_bytes(full, Shape::kXBytes + units * Shape::kUnitBytes);
        }
        const uint8_t* from =
            p.packed + static_cast<int64_t>(rows) * Shape::kUnits * row_bytes + chunk * Shape::kUnitBytes;
#pragma unroll
        for (int i = 0; i < kWarpUnits; ++i) {
            const int unit = warp * kWarpUnits + i;
            if (unit < units) {
                bulk_load(to + unit * Shape::kUnitBytes, from + unit * row_bytes, Shape::kUnitBytes, full, policy);
            }
        }
    };
    const auto load_x = [&](int slot, int token_tile, int chunk) {
        if (warp >= 2) {
            return;
        }
        const int k = chunk * kUnitSize + warp * 64;
        const uint32_t full = shared_address(&shared.full[slot]);
        const uint32_t to = shared_address(shared.x[slot]) + warp * Shape::kPanelBytes;
        tma_load(to, args.x_map, k, token_tile * kN, full, kEvictNormal);
    };

    int rows, token_tile, early = 0;  // chunks whose weight is under way before anything else
    if (p.constant_weight) {
        for (WeightTileWalk walk(args); early < Shape::kSlots && !walk.ended(); walk.next()) {
            walk.place(kN, rows, token_tile);
            for (int i = 0; i < walk.num_chunks && early < Shape::kSlots; ++i, ++early) {
                load_weight(early, rows, walk.first_chunk + i);
            }
        }
    }
    pdl_wait();
    pdl_launch_dependents();
    WeightRingPlace<Shape::kSlots> ring;
    for (WeightTileWalk walk(args); !walk.ended(); walk.next()) {
        walk.place(kN, rows, token_tile);
        for (int i = 0; i < walk.num_chunks; ++i) {
            if (early > 0) {
                --early;
            } else {
                mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
                load_weight(ring.slot, rows, walk.first_chunk + i);
            }
            load_x(ring.slot, token_tile, walk.first_chunk + i);
            ring.advance(1);
        }
    }
}

// --- Consumers -------------------------------------------------------------------------------------------------------

template <typename T, typename F, int kN>
struct WeightTileConsumer {
    using Shape = WeightTileShape<F, kN>;
    static constexpr int kSums = kN / 2;
    static constexpr int kUnits16 = kN / 16;  // of tokens
    // Wgmmas whose sums are multiplied by one scale, and added.
    static constexpr int kPart = F::kScaleSteps == 0 ? 8 : F::kScaleSteps * 2;

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
    __device__ __forceinline__ void unpack(uint32_t (&a)[4][4], int slot, int half) const {
        Half words;
        F::load_half(words, unit(slot), half, order);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            F::template unpack_operand<T>(words, m, order, a[m]);
            wgmma_hold(a[m]);
        }
    }

    // part (+)= operands kFrom to kTo - 1 of a half; kFirst: a part begins.
    template <int kFrom, int kTo, bool kFirst>
    __device__ __forceinline__ void issue(float (&part)[kSums], const uint32_t (&a)[4][4], int slot, int half) const {
        const uint64_t b = wgmma_k_major(shared_address(shared.x[slot]) + half * Shape::kPanelBytes);
        wgmma_fence();
#pragma unroll
        for (int m = kFrom; m < kTo; ++m) {
            wgmma_rs_k_major<T, kN>(part, a[m], b + m * (32 >> 4), !(kFirst && m == kFrom));
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void add(float (&sum)[kSums], const float (&part)[kSums], float2 scale) const {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            if constexpr (F::kScaleSteps == 0) {
                sum[i] += part[i];
            } else {
                sum[i] = fmaf(part[i], i % 4 < 2 ? scale.x : scale.y, sum[i]);
            }
        }
    }

    // sum = W x^T of this team's chunks of a tile, the next num_chunks in the ring.
    __device__ __forceinline__ void multiply(float (&sum)[kSums], int num_chunks) {
        uint32_t even[4][4], odd[4][4];  // operands of the halves of a chunk
        float part[kSums];
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            sum[i] = 0.0f;
        }
        int i = min(team, num_chunks);
        ring.advance(i);
        if (i < num_chunks) {
            wait_full();
            unpack(even, ring.slot, 0);
        }
        while (i < num_chunks) {
            const int slot = ring.slot, next = min(i + Shape::kTeams, num_chunks);
            const uint32_t full = shared_address(&shared.full[slot]), parity = ring.parity;
            float2 scale[8 / kPart];
#pragma unroll
            for (int of = 0; of < 8 / kPart; ++of) {
                scale[of] = F::scale(unit(slot) + F::kPieces * 512, of, order.g);
            }
            ring.advance(next - i);
            i = next;
            const auto unpack_odd = [&] {
                // Passes at once. Without a branch here the compiler puts the unpacking in the middle of the wgmmas
                // before it, and the tensor cores wait.
                mbarrier_wait(full, parity);
                unpack(odd, slot, 1);
            };
            const auto unpack_next = [&] {
                if (i < num_chunks) {
                    wait_full();
                    unpack(even, ring.slot, 0);
                }
            };
            const auto await_part = [&] {
                wgmma_wait<0>();
                wgmma_hold(part);
            };
            const auto finish = [&](float2 of) {
                await_part();
                add(sum, part, of);
            };
            if constexpr (kPart == 8) {
                issue<0, 4, true>(part, even, slot, 0);
                unpack_odd();
                issue<0, 4, false>(part, odd, slot, 1);
                wgmma_wait<1>();
                unpack_next();
            } else if constexpr (kPart == 4) {
                issue<0, 4, true>(part, even, slot, 0);
                unpack_odd();
                finish(scale[0]);
                issue<0, 4, true>(part, odd, slot, 1);
                unpack_next();
            } else {
                issue<0, 2, true>(part, even, slot, 0);
                unpack_odd();
                finish(scale[0]);
                issue<2, 4, true>(part, even, slot, 0);
                finish(scale[1]);
                issue<0, 2, true>(part, odd, slot, 1);
                unpack_next();
                finish(scale[2]);
                issue<2, 4, true>(part, odd, slot, 1);
            }
            await_part();
            release(slot);
            add(sum, part, scale[8 / kPart - 1]);
        }
    }

    __device__ __forceinline__ void sync_group() const {
        named_barrier_sync(1 + group, 128);  // of the first team
    }

    // 16 tokens' sums, transposed by way of shared memory; `turn` counts calls.
    __device__ __forceinline__ void store(const float (&d)[8], const float (&factor)[2], const float (&more)[2],
                                          int64_t token, int64_t row, int turn) const {
        const WeightOnlyParams& p = args.p;
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = pack_pair<T>(fmaf(d[i * 2], factor[i % 2], more[i % 2]),
                                    fmaf(d[i * 2 + 1], factor[i % 2], more[i % 2]));
        }
        unsigned char* panel = shared.out[group][turn % 2];
        const int thread = threadIdx.x % 128;
        stmatrix_x4_transposed(
            shared_address(panel) + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16,
            pairs[0], pairs[1], pairs[2], pairs[3]);
        sync_group();
        const int of = thread / 8;
        const auto piece = reinterpret_cast<const uint4*>(panel + of * 128 + (thread % 8 ^ of % 8) * 16);
        token += of;
        row += thread % 8 * 8;
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
        int turn = 0;
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
            float sum[kSums];
            multiply(sum, walk.num_chunks);
            if (!add_teams(sum, walk.shared)) {
                continue;
            }
            if (!walk.shared) {
#pragma unroll
                for (int i = 0; i < kUnits16; ++i) {
                    const float* d = sum + i * 8;
                    store({d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]}, factor, more, token + i * 16, row, turn++);
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
                store(d, factor, more, token + i * 16, row, turn++);
            }
        }
        if (Shape::kTeams == 2 && team == 1 && shares_tile(args)) {
            cluster_sync();  // the first team's sums
        }
    }
};

// Warpgroup 0 is the producer, the others consume.
template <typename T, typename F, int kN>
__global__ void __launch_bounds__(WeightTileShape<F, kN>::kThreads, 1)
    weight_only_sm90_kernel(const __grid_constant__ WeightOnlyTileArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = WeightTileShape<F, kN>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    WeightTileShared<Shape>& shared = *reinterpret_cast<WeightTileShared<Shape>*>(shared_bytes);
    static_assert(sizeof(WeightTileShared<Shape>) <= Shape::kMostBytes && Shape::kSlots >= 3);
    static_assert(kN * kWeightTileRows * 4 <= Shape::kSlots * Shape::kXBytes, "a cluster's sums are left there");

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.x_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), 8 * 32);  // a team's lanes, each of which has read it
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // known to be the same for all lanes
    if (warpgroup == 0) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (elect_one()) {
            produce_weight_tiles<Shape, kN>(args, shared, warp);
        }
        if (shares_tile(args)) {
            cluster_sync();  // the consumers' sums
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        pdl_wait();
        const int lane = threadIdx.x % 32;
        InOrder order = in_order(lane, F::kIsInt4);
        wgmma_hold(order.piece);  // or the compiler works it out anew for every chunk
        WeightTileConsumer<T, F, kN>{
            args,  shared, (warpgroup - 1) / 2, (warpgroup - 1) % 2, static_cast<int>(threadIdx.x / 32 % 4), lane,
            order, {}}
            .run();
    }
    if (shares_tile(args)) {
        cluster_sync();  // no block ends while another one reads from it
    }
#endif
}

template <typename T, typename F, int kN>
void launch_weight_only_sm90(const WeightOnlyTileArgs& args, void* stream) {
    using Shape = WeightTileShape<F, kN>;
    launch(weight_only_sm90_kernel<T, F, kN>,
           {.grid = dim3(static_cast<unsigned>(args.blocks)),
            .block = dim3(Shape::kThreads),
            .shared_bytes = sizeof(WeightTileShared<Shape>),
            .pdl = true,
            .cluster = static_cast<unsigned>(args.cluster)},
           stream, args);
}

template <typename T, typename F>
void run_weight_only_sm90(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (tokens) {
        case 16: return launch_weight_only_sm90<T, F, 16>(args, stream);
        case 32: return launch_weight_only_sm90<T, F, 32>(args, stream);
        case 64: return launch_weight_only_sm90<T, F, 64>(args, stream);
        case 128: return launch_weight_only_sm90<T, F, 128>(args, stream);
        default: fail("weight_only_linear: there are no tiles of ", tokens, " tokens, only of 16, 32, 64 and 128");
    }
}

template <typename F>
void run_weight_only_sm90(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.dtype) {
        case DType::bf16: return run_weight_only_sm90<bf16, F>(args, tokens, stream);
        case DType::f16: return run_weight_only_sm90<fp16, F>(args, tokens, stream);
        default: fail("weight_only_linear: dtype ", name(args.p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace
}  // namespace fastkernels
