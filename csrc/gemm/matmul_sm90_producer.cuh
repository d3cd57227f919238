// The producer of matmul_sm90: TMA, and a warp of its own for scales of blocks.
#pragma once

#include "common/ptx/cp_async_mbarrier.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/tma_halves.cuh"
#include "common/ptx/uniform.cuh"
#include "gemm/matmul_sm90_out.cuh"
#include "gemm/matmul_sm90_shared.cuh"

namespace fastkernels {
namespace {

// Rows of the weight from `row` on, gated those of the gate and of up in turn, to this block or all of the cluster.
template <int kCluster = 1>
__device__ __forceinline__ void load_weight_rows(uint32_t to, const MatmulArgs& args, const CUtensorMap& map, int x,
                                                 int row, uint32_t full, uint64_t policy) {
    constexpr uint16_t kBlocks = (1 << kCluster) - 1;
    if constexpr (kCluster == 1) {
        args.gated ? tma_load_halves(to, map, x, row, full, policy) : tma_load(to, map, x, row, full, policy);
    } else {
        args.gated ? tma_load_halves_multicast(to, map, x, row, full, kBlocks, policy)
                   : tma_load_multicast(to, map, x, row, full, kBlocks, policy);
    }
}

template <typename Shape, bool kTokensAreA, int kN, int kCluster>
__device__ __forceinline__ void produce(const MatmulArgs& args, MatmulShared<Shape>& shared, int worker, int rank) {
    constexpr int kColumns = kN / kCluster;  // of B that this block loads
    const uint32_t slots = keep(shared_address(shared.ring)), full_barriers = keep(shared_address(shared.full)),
                   empty_barriers = keep(shared_address(shared.empty));
    const MatmulSchedule& schedule = args.schedule;
    // Of few tokens the weight passes through L2 once; x and the parts of tiles are to stay there.
    constexpr uint64_t kWeightPolicy = kTokensAreA ? kEvictNormal : kEvictFirst, kXPolicy = kEvictNormal;

    const auto load_a = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        const uint32_t a = slots + slot * Shape::kSlotBytes, full = full_barriers + slot * 8;
        const int x = chunk * Shape::kElements, y = (place.a * kCluster + rank) * kMatmulRows;
        if constexpr (kTokensAreA) {
            tma_load(a, args.a_map, x, y, full, kXPolicy);
        } else {
            load_weight_rows(a, args, args.a_map, x, y, full, kWeightPolicy);
        }
    };
    const auto load_b = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        const uint32_t b = slots + slot * Shape::kSlotBytes + Shape::kABytes + rank * (kColumns * 128);
        const int x = chunk * Shape::kElements, y = place.b * kN + rank * kColumns;
        const uint32_t full = full_barriers + slot * 8;
        if constexpr (kTokensAreA) {
            load_weight_rows<kCluster>(b, args, args.b_map, x, y, full, kWeightPolicy);
        } else if constexpr (kCluster == 1) {
            tma_load(b, args.b_map, x, y, full, kXPolicy);
        } else {
            tma_load_multicast(b, args.b_map, x, y, full, (1 << kCluster) - 1, kXPolicy);
        }
    };
    const auto load_weight = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        // Both operands' bytes, this block's and the others', are announced at once.
        mbarrier_arrive_expect_bytes(full_barriers + slot * 8, Shape::kSlotBytes);
        if constexpr (kTokensAreA) {
            load_b(slot, place, chunk);
        } else {
            load_a(slot, place, chunk);
        }
    };
    const auto load_x = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        if constexpr (kTokensAreA) {
            load_a(slot, place, chunk);
        } else {
            load_b(slot, place, chunk);
        }
    };

    MatmulSegment segment;
    int early = 0;  // chunks whose weight is under way before anything else
    if (args.constant_weight) {
        MatmulWalk walk(schedule, worker);
        while (early < Shape::kSlots && walk.next(schedule, segment)) {
            const MatmulPlace place = schedule.place(segment.tile);
            for (int chunk = segment.begin; chunk < segment.end && early < Shape::kSlots; ++chunk, ++early) {
                load_weight(early, place, chunk);
            }
        }
    }
    pdl_wait();
    pdl_launch_dependents();
    RingPlace<Shape::kSlots> ring;
    MatmulWalk walk(schedule, worker);
    while (walk.next(schedule, segment)) {
        const MatmulPlace place = schedule.place(segment.tile);
        for (int chunk = segment.begin; chunk < segment.end; ++chunk) {
            if (early > 0) {
                --early;
            } else {
                mbarrier_wait(empty_barriers + ring.slot() * 8, ring.parity() ^ 1);
                load_weight(ring.slot(), place, chunk);
            }
            load_x(ring.slot(), place, chunk);
            ring.next();
        }
    }
}

// Scales of blocks, a warp: those of each chunk of a segment arrive at its full barrier too, one arrival a lane.
template <typename Shape, bool kTokensAreA>
__device__ __forceinline__ void copy_scales(const MatmulArgs& args, uint32_t scales, uint32_t full,
                                            RingPlace<Shape::kSlots>& ring, int a_row, int b_row, int begin, int end) {
    constexpr int kEach = Shape::kTokens / 32;
    const int lane = threadIdx.x % 32, chunks = args.schedule.chunks;
    // Where their scales of the chunk are. 32 bits do: x has 128 elements for each.
    uint32_t token[kEach], weight;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int row = min((kTokensAreA ? a_row : b_row) + i * 32 + lane, args.num_tokens - 1);
        token[i] = static_cast<uint32_t>(row) * chunks + begin;
    }
    // Where they are in one block, gated in one of each half, two: of even rows of eight and of odd ones.
    const int first = kTokensAreA ? b_row : a_row;
    const int weight_row = Shape::kPieces == 1 ? matmul_weight_row(args, first + lane % 2 * 8)
                                               : min(first + lane % Shape::kPieces * 64, args.rows - 1);
    weight = static_cast<uint32_t>(weight_row / 128) * chunks + begin;
    for (int chunk = begin; chunk < end; ++chunk) {
        mbarrier_wait(full + (Shape::kSlots + ring.slot()) * 8, ring.parity() ^ 1);
        const uint32_t to = scales + lane * 4 + ring.slot() * (Shape::kChunkScales * 4);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            cp_async_4(to + i * 128, args.token_scales + token[i]++);
        }
        if (lane < std::max(2, Shape::kPieces)) {
            cp_async_4(to + Shape::kTokens * 4, args.weight_scales + weight);
        }
        ++weight;
        cp_async_arrive(uniform(full + ring.slot() * 8));
        ring.next();
    }
}

template <typename Shape, bool kTokensAreA, int kN, int kCluster>
__device__ __forceinline__ void produce_scales(const MatmulArgs& args, MatmulShared<Shape>& shared, int worker,
                                               int rank) {
    const uint32_t scales = keep(shared_address(shared.chunk_scales)), full = keep(shared_address(shared.full));
    pdl_wait();
    RingPlace<Shape::kSlots> ring;
    MatmulWalk walk(args.schedule, worker);
    MatmulSegment segment;
    while (walk.next(args.schedule, segment)) {
        const MatmulPlace place = args.schedule.place(segment.tile);
        copy_scales<Shape, kTokensAreA>(args, scales, full, ring, (place.a * kCluster + rank) * kMatmulRows,
                                        place.b * kN, segment.begin, segment.end);
    }
}

}  // namespace
}  // namespace fastkernels
