// What the roles of weight_only_sm90 share, sizes, shared memory and the walk over tiles, and its producer.
#pragma once

#include <algorithm>

#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/tma.cuh"
#include "gemm/weight_only_sm90.h"
#include "gemm/weight_only_sm90_formats.cuh"

namespace fastkernels {
namespace {

template <typename F, int kN>
struct WeightTileShape {
    // Of few tokens two teams of two warpgroups take chunks by turns, and so hide each other's latency.
    static constexpr int kTeams = kN <= 32 ? 2 : 1, kConsumers = kTeams * 2;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kUnits = kWeightTileRows / kUnitRows;
    static constexpr int kUnitBytes = F::kPieces * 512 + F::kScaleBytes;
    static constexpr int kPanels = kTakesE4m3<F> ? 1 : 2;
    static constexpr int kPanelSize = kUnitSize / kPanels, kPanelBytes = kN * 128;  // elements of each token
    static constexpr int kXBytes = kPanels * kPanelBytes, kWeightBytes = kUnits * kUnitBytes;
    static constexpr int kScales = kTakesE4m3<F> ? kN : 4;
    static constexpr int kMeetBytes = kTeams == 2 ? kN * kWeightTileRows * 4 : 16;  // the second team's sums
    static constexpr int kMostBytes = 227 * 1024;
    static constexpr int slots(int out_units) {
        const int rest = 512 + 8 * out_units * kOutBytes + 2 * kScales * 4 + kMeetBytes;
        return std::min(16, (kMostBytes - rest) / (kXBytes + kWeightBytes));
    }
    static constexpr int kOutBytes = 16 * 32;  // 16 tokens, a warp's 16 rows; so many times in each warp's hands:
    static constexpr int kOutUnits = kN == 16 ? 1 : kN == 32 || slots(4) < 3 ? (slots(2) < 3 ? 1 : 2) : 4;
    static constexpr int kSlots = slots(kOutUnits);
    // A block has what it is launched with, the same for all threads, in eights.
    static constexpr int kProducerRegisters = kTeams == 2 ? 64 : 40, kConsumerRegisters = kTeams == 2 ? 104 : 232;
    static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                  (kConsumers + 1) * (65536 / kThreads / 8 * 8));
};

template <typename Shape>
struct WeightTileShared {
    alignas(1024) unsigned char x[Shape::kSlots][Shape::kXBytes];
    alignas(16) unsigned char out[8][Shape::kOutUnits][Shape::kOutBytes];  // of the first team's warps
    alignas(16) unsigned char meet[Shape::kMeetBytes];
    alignas(16) float x_scales[2][Shape::kScales];  // of a tile's tokens, for each warpgroup
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
        if (warp >= Shape::kPanels) {
            return;
        }
        const int k = chunk * kUnitSize + warp * Shape::kPanelSize;
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

}  // namespace
}  // namespace fastkernels
