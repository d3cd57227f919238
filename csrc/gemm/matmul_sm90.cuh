// out = x weight^T + bias on Hopper: TMA, wgmma, one block an SM that goes from tile to tile.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]
//   T, of x and weight: bf16 | fp16 | e4m3 | int8, or of x e5m2 where the weight is e4m3; out and bias: bf16 | fp16
//
// A tile is 128 rows of A for each block of the cluster, times kN rows of B. For many tokens A is x and B the weight;
// for few of them A is the weight and B the tokens, so that no row of the tensor core's 64 goes to waste. K is cut into
// chunks of 128 bytes. Which block has which chunks of which tile: matmul_sm90_schedule.h.
//   Producer, one thread: loads 128 rows of A and kN of B, a chunk at a time, into a ring. In a cluster a block loads
//   its part of B and sends it to all. What the weight has in the first round of the ring is asked for before
//   griddepcontrol.wait, while the kernel before this one ends.
//   Scales of blocks: another warp copies those of a chunk to its place in the ring.
//   Consumers, 2 warpgroups, 64 rows of A each: the product of a chunk is issued before that of the one
//   before is waited for. Out passes through shared memory, and from there by TMA, which keeps to the matrix's edges.
// Sums are fp32, and int32 of int8, which zero points of x, times the sums of the weight's rows, are taken off. wgmma
// adds up fp8 with about 14 bits: sums of kPromote chunks, of one where blocks have scales, are added to fp32 registers
// where there is room for both, that is, but for tiles of 256 columns.
// At full rate wgmma leaves an SM's schedulers a sixth of their slots. Instructions past that, of whatever kind, cost
// it a cycle each, so the loop over the chunks has few.
// A tile that is cut along K: every warpgroup leaves its part in the workspace, and who comes last adds the parts up in
// their order, so nobody waits, and the same bits come out whoever it is.
//
// FLOPs: 2 * K an element of out. Bytes: from L2, kN rows of B a cluster and tile, 128 rows of A a block and tile.
// Source: NVIDIA's CUTLASS (tiles, clusters), Zhao et al. 2025 (DeepGEMM: scales of blocks).
#pragma once

#include <cuda_fp8.h>

#include <algorithm>

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/cp_async_mbarrier.cuh"
#include "common/ptx/load_shared.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/uniform.cuh"
#include "common/ptx/wgmma.cuh"
#include "gemm/matmul_sm90.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
struct MatmulShape {
    static constexpr int kConsumers = 2;  // warpgroups
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kElements = 128 / static_cast<int>(sizeof(T));  // of a chunk
    static constexpr int kABytes = kMatmulRows * 128, kBBytes = kN * 128, kSlotBytes = kABytes + kBBytes;
    // Of out, as a warpgroup hands it to TMA: panels of 64 elements, two in turn.
    static constexpr int kPanels = kTokensAreA ? 2 : 1;
    static constexpr int kPanelBytes = (kTokensAreA ? 64 : kN) * 128;
    static constexpr int kOutBytes = kConsumers * kPanels * kPanelBytes;
    // Scales of blocks, of a chunk: of the tile's tokens, and of the weight's rows. These are in one block of 128, but
    // 192 of them in two; each 64 have theirs.
    static constexpr bool kByBlock = kScales == MatmulScales::block;
    static constexpr int kTokens = kTokensAreA ? kMatmulRows : kN;
    static constexpr int kPieces = kTokensAreA && kN == 192 ? 3 : 1;
    static constexpr int kChunkScales = kByBlock ? kTokens + 4 : 0;
    // Of D's columns, and of a warpgroup's rows.
    static constexpr int kTileScales = kScales == MatmulScales::channel ? kN + 64 : 0;
    static constexpr int kMostBytes = 227 * 1024;
    static constexpr int kSlots =
        (kMostBytes - 512 - kOutBytes - kConsumers * kTileScales * 4) / (kSlotBytes + kChunkScales * 4);
    // 65,536 a block
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

template <typename Shape>
struct MatmulShared {
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];  // A, then B
    alignas(1024) unsigned char out[Shape::kConsumers][Shape::kPanels * Shape::kPanelBytes];
    alignas(16) float chunk_scales[std::max(1, Shape::kSlots* Shape::kChunkScales)];  // of tokens, then of the weight
    alignas(16) float tile_scales[std::max(1, Shape::kConsumers* Shape::kTileScales)];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];              // in this order
    int is_last[Shape::kConsumers], others_done[Shape::kConsumers];  // of a tile that is cut
};

// A place in the ring and the parity of its phase.
template <int kSlots>
struct RingPlace {
    static constexpr bool kCounts = (kSlots & (kSlots - 1)) == 0;  // fewer instructions, where it can be done
    uint32_t at = 0, flips = 0;

    __device__ __forceinline__ uint32_t slot() const {
        return kCounts ? at % kSlots : at;
    }
    __device__ __forceinline__ uint32_t parity() const {
        return kCounts ? at / kSlots % 2 : flips;
    }
    __device__ __forceinline__ void next() {
        ++at;
        if (!kCounts && at == kSlots) {
            at = 0;
            flips ^= 1;
        }
    }
};

// --- Producer --------------------------------------------------------------------------------------------------------

template <typename Shape, bool kTokensAreA, int kN, int kCluster>
__device__ __forceinline__ void produce(const MatmulArgs& args, MatmulShared<Shape>& shared, int worker, int rank) {
    constexpr int kColumns = kN / kCluster;  // of B that this block loads
    const uint32_t slots = keep(shared_address(shared.ring)), full_barriers = keep(shared_address(shared.full)),
                   empty_barriers = keep(shared_address(shared.empty));
    const MatmulSchedule& schedule = args.schedule;
    // Of few tokens the weight passes through L2 once; x and the parts of tiles are to stay there.
    constexpr uint64_t kWeightPolicy = kTokensAreA ? kEvictNormal : kEvictFirst, kXPolicy = kEvictNormal;

    const auto load_a = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        tma_load(slots + slot * Shape::kSlotBytes, args.a_map, chunk * Shape::kElements,
                 (place.a * kCluster + rank) * kMatmulRows, full_barriers + slot * 8,
                 kTokensAreA ? kXPolicy : kWeightPolicy);
    };
    const auto load_b = [&](uint32_t slot, const MatmulPlace& place, int chunk) {
        const uint32_t b = slots + slot * Shape::kSlotBytes + Shape::kABytes + rank * (kColumns * 128);
        const int x = chunk * Shape::kElements, y = place.b * kN + rank * kColumns;
        const uint32_t full = full_barriers + slot * 8;
        constexpr uint64_t kPolicy = kTokensAreA ? kWeightPolicy : kXPolicy;
        if constexpr (kCluster == 1) {
            tma_load(b, args.b_map, x, y, full, kPolicy);
        } else {
            tma_load_multicast(b, args.b_map, x, y, full, (1 << kCluster) - 1, kPolicy);
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

// Scales of blocks, a warp: those of each chunk arrive at its full barrier too, one arrival a lane.
template <typename Shape, bool kTokensAreA, int kN, int kCluster>
__device__ __forceinline__ void produce_scales(const MatmulArgs& args, MatmulShared<Shape>& shared, int worker,
                                               int rank) {
    constexpr int kEach = Shape::kTokens / 32;
    const int lane = threadIdx.x % 32, chunks = args.schedule.chunks;
    const uint32_t scales = keep(shared_address(shared.chunk_scales) + lane * 4),
                   full = keep(shared_address(shared.full)), empty = keep(shared_address(shared.empty));
    pdl_wait();
    RingPlace<Shape::kSlots> ring;
    MatmulWalk walk(args.schedule, worker);
    MatmulSegment segment;
    while (walk.next(args.schedule, segment)) {
        const MatmulPlace place = args.schedule.place(segment.tile);
        const int a_row = (place.a * kCluster + rank) * kMatmulRows, b_row = place.b * kN;
        // Where their scales of the chunk are. 32 bits do: x has 128 elements for each.
        uint32_t token[kEach], weight;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int row = min((kTokensAreA ? a_row : b_row) + i * 32 + lane, args.num_tokens - 1);
            token[i] = static_cast<uint32_t>(row) * chunks + segment.begin;
        }
        const int weight_row = min((kTokensAreA ? b_row : a_row) + lane % Shape::kPieces * 64, args.out_size - 1);
        weight = static_cast<uint32_t>(weight_row / 128) * chunks + segment.begin;
        for (int chunk = segment.begin; chunk < segment.end; ++chunk) {
            mbarrier_wait(empty + ring.slot() * 8, ring.parity() ^ 1);
            const uint32_t to = scales + ring.slot() * (Shape::kChunkScales * 4);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                cp_async_4(to + i * 128, args.token_scales + token[i]++);
            }
            if (lane < Shape::kPieces) {
                cp_async_4(to + Shape::kTokens * 4, args.weight_scales + weight);
            }
            ++weight;
            cp_async_arrive(uniform(full + ring.slot() * 8));
            ring.next();
        }
    }
}

// --- Consumers -------------------------------------------------------------------------------------------------------

// The descriptor of wgmma_k_major in two steps: the low half, to which addresses / 16 may be added as long as they stay
// within the 256 KB that it holds, and the whole.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) {
    return static_cast<uint32_t>(wgmma_k_major(address));
}
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
    return (wgmma_k_major(0) & 0xffffffff00000000) | low;
}

template <int kCount>
__device__ __forceinline__ void pack_out(const float (&x)[kCount], uint32_t (&pairs)[kCount / 2], bool is_fp16) {
    if (is_fp16) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const __half2 pair = __floats2half2_rn(x[i * 2], x[i * 2 + 1]);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i * 2], x[i * 2 + 1]);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    }
}

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
struct Consumer {
    using Shape = MatmulShape<T, kScales, kTokensAreA, kN, kCluster>;
    using Sum = WgmmaSum<T>;
    using TypeOfA = std::conditional_t<kTokensAreA, T, MatmulWeight<T>>;
    using TypeOfB = std::conditional_t<kTokensAreA, MatmulWeight<T>, T>;
    static constexpr int kSums = kN / 2;
    // Chunks that wgmma adds up by itself; 0: all.
    static constexpr int kPromote = !kIsFp8<T> || kN > 192           ? 0
                                    : kScales == MatmulScales::block ? 1
                                    : kTokensAreA                    ? 8
                                                                     : 4;

    const MatmulArgs& args;
    MatmulShared<Shape>& shared;
    const int worker, rank, group, warp, lane;  // group: this warpgroup
    const uint32_t full;                        // address of the barriers
    const uint32_t scales;                      // and of the scales of chunks
    const uint32_t ring_a;                      // low half of the descriptor of this warpgroup's A of slot 0
    const uint32_t a_to_b;                      // what makes it that of B
    RingPlace<Shape::kSlots> ring;

    // With scales of blocks by every lane, which has read some.
    __device__ __forceinline__ void release(uint32_t slot) {
        if constexpr (Shape::kByBlock) {
            mbarrier_arrive(full + (Shape::kSlots + slot) * 8);
            if (kCluster > 1 && lane < kCluster && lane != rank) {
                mbarrier_arrive_in_block(full + (Shape::kSlots + slot) * 8, lane);
            }
        } else if constexpr (kCluster == 1) {
            if (lane == 0) {
                mbarrier_arrive(full + (Shape::kSlots + slot) * 8);
            }
        } else if (lane < kCluster) {
            mbarrier_arrive_in_block(full + (Shape::kSlots + slot) * 8, lane);
        }
    }

    __device__ __forceinline__ void wait_full() {
        mbarrier_wait(full + ring.slot() * 8, ring.parity());
    }

    template <bool kFirst>
    __device__ __forceinline__ void issue(Sum (&sum)[kSums]) {
        const uint32_t a = uniform(ring_a + ring.slot() * (Shape::kSlotBytes >> 4)), b = a + a_to_b;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            wgmma_ss<TypeOfA, kN, TypeOfB>(sum, descriptor(a + k * (32 >> 4)), descriptor(b + k * (32 >> 4)),
                                           !kFirst || k > 0);
        }
        wgmma_commit();
    }

    // sum = A B^T of so many chunks, the next in the ring. The first is apart, for the compiler's sake: it would order
    // the loop's wgmmas behind each other if what they add to came from elsewhere.
    __device__ __forceinline__ void multiply(Sum (&sum)[kSums], int chunks) {
        uint32_t slot = multiply_first(sum);
        for (int i = 1; i < chunks; ++i) {
            slot = multiply_next(sum, slot);
        }
        multiply_end(sum, slot);
    }
    template <int kChunks>
    __device__ __forceinline__ void multiply(Sum (&sum)[kSums]) {
        uint32_t slot = multiply_first(sum);
#pragma unroll
        for (int i = 1; i < kChunks; ++i) {
            slot = multiply_next(sum, slot);
        }
        multiply_end(sum, slot);
    }
    __device__ __forceinline__ uint32_t multiply_first(Sum (&sum)[kSums]) {
        wait_full();
        issue<true>(sum);
        const uint32_t slot = ring.slot();
        ring.next();
        return slot;
    }
    __device__ __forceinline__ uint32_t multiply_next(Sum (&sum)[kSums], uint32_t before) {
        wait_full();
        issue<false>(sum);
        wgmma_wait<1>();
        release(before);
        const uint32_t slot = ring.slot();
        ring.next();
        return slot;
    }
    __device__ __forceinline__ void multiply_end(Sum (&sum)[kSums], uint32_t slot) {
        wgmma_wait<0>();
        wgmma_hold(sum);
        release(slot);
    }

    // Row of A of this warpgroup's first row.
    __device__ __forceinline__ int first_row(const MatmulPlace& place) const {
        return (place.a * kCluster + rank) * kMatmulRows + group * 64;
    }

    // sum += A B^T of the chunk in the ring, times its scales.
    __device__ __forceinline__ void multiply_scaled(Sum (&sum)[kSums], Sum (&part)[kSums], uint32_t token_at) {
        wait_full();
        issue<true>(part);
        const uint32_t at = scales + ring.slot() * (Shape::kChunkScales * 4);
        constexpr int kFactors = kTokensAreA ? Shape::kPieces * 2 : kN / 4;
        float factor[kFactors];
        const float4 weight = load_shared_4(at + Shape::kTokens * 4);
        if constexpr (kTokensAreA) {
            const float first = load_shared(at + token_at), second = load_shared(at + token_at + 8 * 4);
            const float of_pieces[3] = {weight.x, weight.y, weight.z};
#pragma unroll
            for (int i = 0; i < Shape::kPieces; ++i) {
                factor[i * 2] = first * of_pieces[i];
                factor[i * 2 + 1] = second * of_pieces[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kFactors / 2; ++i) {
                const float2 pair = load_shared_2(at + token_at + i * (8 * 4));
                factor[i * 2] = pair.x * weight.x;
                factor[i * 2 + 1] = pair.y * weight.x;
            }
        }
        wgmma_wait<0>();
        wgmma_hold(part);
        release(ring.slot());
        ring.next();
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const int at = kTokensAreA ? (Shape::kPieces == 3 ? i / 32 : 0) * 2 + i / 2 % 2 : i / 4 * 2 + i % 2;
            sum[i] = fmaf(part[i], factor[at], sum[i]);
        }
    }

    // The sums of a segment. With kPromote, those of kPromote chunks at a time are added to fp32 registers.
    __device__ __forceinline__ void multiply_segment(Sum (&sum)[kSums], const MatmulSegment& segment) {
        if constexpr (kPromote == 0) {
            multiply(sum, segment.end - segment.begin);
        } else {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                sum[i] = 0;
            }
            Sum part[kSums];
            if constexpr (kScales == MatmulScales::block) {
                // Bytes from a chunk's scales to this thread's first.
                const uint32_t token_at =
                    keep((kTokensAreA ? group * 64 + warp * 16 + lane / 4 : lane % 4 * 2) * sizeof(float));
                for (int chunk = segment.begin; chunk < segment.end; ++chunk) {
                    multiply_scaled(sum, part, token_at);
                }
            } else {
                // The second warpgroup begins with half, so that one adds while the other multiplies.
                int left = segment.end - segment.begin;
                int odd = min(left, group == 0 ? left % kPromote : kPromote / 2);
                while (left > 0) {
                    if (odd > 0) {
                        multiply(part, odd);
                    } else {
                        multiply<kPromote>(part);
                    }
                    left -= odd > 0 ? odd : kPromote;
                    odd = left < kPromote ? left : 0;
#pragma unroll
                    for (int i = 0; i < kSums; ++i) {
                        sum[i] += part[i];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void sync_group() const {
        named_barrier_sync(1 + group, 128);
    }

    // Of a tile that is cut: leaves this warpgroup's part in the workspace. The last to come gets the whole sum, the
    // parts added in their order, its own read back among them. Only the first part, which the sum begins with, stays
    // in registers if the others are done by then, which is the rule in stream-K where two share a tile.
    __device__ __forceinline__ bool add_parts(Sum (&sum)[kSums], const MatmulSegment& segment) {
        constexpr int kVectors = kSums / 4;
        const MatmulSchedule& schedule = args.schedule;
        const int thread = threadIdx.x % 128;
        const int parts = schedule.parts(segment.tile);
        const auto others = static_cast<unsigned>(parts - 1);
        unsigned* counter = args.counters + (segment.tile * kCluster + rank) * Shape::kConsumers + group;
        const auto part = [&](int of) {
            const int slot = schedule.slot(segment.tile, of) * kCluster + rank;
            return reinterpret_cast<uint4*>(args.partials + static_cast<int64_t>(slot) * (kN * kMatmulRows) +
                                            group * (kN * 64)) +
                   thread;
        };
        bool is_whole = false;
        if (segment.part == 0) {
            if (thread == 0) {
                const bool done = *static_cast<volatile unsigned*>(counter) == others;
                if (done) {
                    *counter = 0;
                }
                shared.others_done[group] = done;
                __threadfence();
            }
            sync_group();
            is_whole = __shfl_sync(0xffffffffu, shared.others_done[group], 0) != 0;
        }
        if (!is_whole) {
            uint4* mine = part(segment.part);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const Sum* x = sum + i * 4;
                __stcg(mine + i * 128, make_uint4(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3])));
            }
            __threadfence();
            sync_group();
            if (thread == 0) {
                shared.is_last[group] = atomicInc(counter, others) == others;  // wraps to 0, ready for the next launch
                __threadfence();
            }
            sync_group();
            if (__shfl_sync(0xffffffffu, shared.is_last[group], 0) == 0) {  // known to be the same for all lanes
                return false;
            }
            const uint4* begin = part(0);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint4 y = __ldcg(begin + i * 128);
                Sum* x = sum + i * 4;
                x[0] = value(y.x);
                x[1] = value(y.y);
                x[2] = value(y.z);
                x[3] = value(y.w);
            }
        }
#pragma unroll(kSums <= 32 ? 4 : 1)
        for (int of = 1; of < parts; ++of) {
            const uint4* theirs = part(of);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint4 y = __ldcg(theirs + i * 128);
                Sum* x = sum + i * 4;
                x[0] += value(y.x);
                x[1] += value(y.y);
                x[2] += value(y.z);
                x[3] += value(y.w);
            }
        }
        return true;
    }

    static __device__ __forceinline__ uint32_t bits(Sum x) {
        if constexpr (std::is_same_v<Sum, float>) {
            return __float_as_uint(x);
        } else {
            return static_cast<uint32_t>(x);
        }
    }
    static __device__ __forceinline__ Sum value(uint32_t x) {
        if constexpr (std::is_same_v<Sum, float>) {
            return __uint_as_float(x);
        } else {
            return static_cast<Sum>(x);
        }
    }

    // Past the edges of the matrix the last ones, whose products are not written.
    __device__ __forceinline__ float bias(int row) const {
        if (args.bias == nullptr) {
            return 0.0f;
        }
        const int at = min(row, args.out_size - 1);
        return args.out_is_fp16 ? to_float(static_cast<const fp16*>(args.bias)[at])
                                : to_float(static_cast<const bf16*>(args.bias)[at]);
    }
    // A tile's scales, on their way to shared memory while it is multiplied.
    __device__ __forceinline__ void load_scales(const MatmulPlace& place) {
        if constexpr (kScales == MatmulScales::channel) {
            cp_async_wait<0>();
            const uint32_t to = shared_address(shared.tile_scales + group * Shape::kTileScales);
            for (int i = threadIdx.x % 128; i < Shape::kTileScales; i += 128) {
                const bool is_column = i < kN;
                const int at = is_column ? place.b * kN + i : first_row(place) + i - kN;
                cp_async_4(to + i * 4, is_column == kTokensAreA
                                           ? args.weight_scales + min(at, args.out_size - 1) * args.weight_scale_stride
                                           : args.token_scales + min(at, args.num_tokens - 1));
            }
            cp_async_commit();
        }
    }
    // Once they are there for all of the warpgroup: of columns i and i + 1, and of a row.
    __device__ __forceinline__ float2 column_scales(int i) const {
        return kScales == MatmulScales::channel
                   ? *reinterpret_cast<const float2*>(shared.tile_scales + group * Shape::kTileScales + i)
                   : make_float2(1.0f, 1.0f);
    }
    __device__ __forceinline__ float row_scale(int i) const {
        return kScales == MatmulScales::channel ? shared.tile_scales[group * Shape::kTileScales + kN + i] : 1.0f;
    }

    // What zero points add to a sum is the product of these.
    __device__ __forceinline__ Sum token_zero(int token) const {
        if constexpr (std::is_same_v<T, int8_t>) {
            return args.token_zeros == nullptr ? 0 : args.token_zeros[min(token, args.num_tokens - 1)];
        }
        return 0;
    }
    __device__ __forceinline__ Sum weight_sum(int row) const {
        if constexpr (std::is_same_v<T, int8_t>) {
            return args.weight_sums == nullptr ? 0 : args.weight_sums[min(row, args.out_size - 1)];
        }
        return 0;
    }

    // x is A: D's rows are tokens. A panel of 64 rows of 128 bytes at a time, one being filled while TMA reads the
    // other.
    __device__ __forceinline__ void store_rows(const Sum (&sum)[kSums], int token, int row) {
        float token_scale[2];
        const Sum zero[2] = {token_zero(token + warp * 16 + lane / 4), token_zero(token + warp * 16 + lane / 4 + 8)};
#pragma unroll
        for (int pass = 0; pass < kN / 64; ++pass) {
            const uint32_t panel = shared_address(shared.out[group]) + pass % 2 * Shape::kPanelBytes;
            const int column = row + pass * 64 + lane % 4 * 2;
            float more[16] = {};
            if (args.bias != nullptr) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    more[i] = bias(column + i / 2 * 8 + i % 2);
                }
            }
            if (threadIdx.x % 128 == 0) {
                if (pass == 0 && kN / 64 % 2 == 1) {  // the panel of the last pass before
                    tma_store_wait_read<0>();
                } else {
                    tma_store_wait_read<1>();
                }
            }
            if (pass == 0) {
                cp_async_wait<0>();
            }
            sync_group();
            if (pass == 0) {
                token_scale[0] = row_scale(warp * 16 + lane / 4);
                token_scale[1] = row_scale(warp * 16 + lane / 4 + 8);
            }
            float2 scale[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                scale[i] = column_scales(pass * 64 + i * 8 + lane % 4 * 2);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float out[8];
                const int first = column + i * 16;
                const Sum row_sum[4] = {weight_sum(first), weight_sum(first + 1), weight_sum(first + 8),
                                        weight_sum(first + 9)};
#pragma unroll
                for (int j = 0; j < 8; j += 2) {  // two tiles of 8 columns, two rows
                    const int tile = i * 2 + j / 4, half = j / 2 % 2;
                    const Sum* d = sum + pass * 32 + i * 8 + j;
                    const Sum low = d[0] - zero[half] * row_sum[j / 4 * 2];
                    const Sum high = d[1] - zero[half] * row_sum[j / 4 * 2 + 1];
                    out[j] = finish(low, token_scale[half] * scale[tile].x, more[tile * 2]);
                    out[j + 1] = finish(high, token_scale[half] * scale[tile].y, more[tile * 2 + 1]);
                }
                uint32_t pairs[4];
                pack_out(out, pairs, args.out_is_fp16);
                const uint32_t address = panel + (warp * 16 + lane % 16) * 128 + ((i * 2 + lane / 16) ^ lane % 8) * 16;
                stmatrix_x4(address, pairs[0], pairs[1], pairs[2], pairs[3]);
            }
            fence_async_shared();
            sync_group();
            if (threadIdx.x % 128 == 0) {
                tma_store(args.out_map, panel, row + pass * 64, token);
                tma_store_commit();
            }
        }
    }

    // The weight is A: D's columns are tokens, and D is transposed on its way. One panel of kN tokens, 64 elements
    // each.
    __device__ __forceinline__ void store_columns(const Sum (&sum)[kSums], int token, int row) {
        const uint32_t panel = shared_address(shared.out[group]);
        float more[2];
        Sum row_sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            more[half] = bias(row + warp * 16 + lane / 4 + half * 8);
            row_sum[half] = weight_sum(row + warp * 16 + lane / 4 + half * 8);
        }
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read<0>();
        }
        cp_async_wait<0>();
        sync_group();
        const float weight_scale[2] = {row_scale(warp * 16 + lane / 4), row_scale(warp * 16 + lane / 4 + 8)};
#pragma unroll
        for (int pass = 0; pass < kN / 32; ++pass) {
            float out[16];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = pass * 32 + i * 8 + lane % 4 * 2;
                const float2 scale = column_scales(column);
                const Sum zero[2] = {token_zero(token + column), token_zero(token + column + 1)};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Sum* d = sum + pass * 16 + i * 4 + half * 2;
                    const Sum low = d[0] - zero[0] * row_sum[half], high = d[1] - zero[1] * row_sum[half];
                    out[i * 4 + half * 2] = finish(low, scale.x * weight_scale[half], more[half]);
                    out[i * 4 + half * 2 + 1] = finish(high, scale.y * weight_scale[half], more[half]);
                }
            }
            uint32_t pairs[8];
            pack_out(out, pairs, args.out_is_fp16);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t address = panel + (pass * 32 + i * 16 + lane / 16 * 8 + lane % 8) * 128 +
                                         ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
                stmatrix_x4_transposed(address, pairs[i * 4], pairs[i * 4 + 1], pairs[i * 4 + 2], pairs[i * 4 + 3]);
            }
        }
        fence_async_shared();
        sync_group();
        if (threadIdx.x % 128 == 0) {
            tma_store(args.out_map, panel, row, token);
            tma_store_commit();
        }
    }

    static __device__ __forceinline__ float finish(Sum sum, float factor, float bias) {
        if constexpr (kScales == MatmulScales::channel) {
            return fmaf(static_cast<float>(sum), factor, bias);
        } else {
            return sum + bias;
        }
    }

    __device__ __forceinline__ void run() {
        const MatmulSchedule& schedule = args.schedule;
        MatmulWalk walk(schedule, worker);
        MatmulSegment segment;
        while (walk.next(schedule, segment)) {
            const MatmulPlace place = schedule.place(segment.tile);
            load_scales(place);
            Sum sum[kSums];
            multiply_segment(sum, segment);
            if (segment.end - segment.begin == schedule.chunks || add_parts(sum, segment)) {
                if constexpr (kTokensAreA) {
                    store_rows(sum, first_row(place), place.b * kN);
                } else {
                    store_columns(sum, place.b * kN, first_row(place));
                }
            }
        }
        if (threadIdx.x % 128 == 0) {
            tma_store_wait();
        }
    }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FK_CLUSTER(blocks)  // the kernel is empty there
#else
#define FK_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#endif

// Warpgroup 0 is the producer, the others consume.
template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
__global__ void FK_CLUSTER(kCluster) __launch_bounds__(MatmulShape<T, kScales, kTokensAreA, kN, kCluster>::kThreads, 1)
    matmul_sm90_kernel(const __grid_constant__ MatmulArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = MatmulShape<T, kScales, kTokensAreA, kN, kCluster>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    MatmulShared<Shape>& shared = *reinterpret_cast<MatmulShared<Shape>*>(shared_bytes);
    static_assert(sizeof(MatmulShared<Shape>) <= Shape::kMostBytes && Shape::kSlots >= 3);
    const int rank = kCluster == 1 ? 0 : cluster_rank(), worker = blockIdx.x / kCluster;

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.a_map);
        tma_prefetch_map(args.b_map);
        tma_prefetch_map(args.out_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), Shape::kByBlock ? 1 + 32 : 1);
            mbarrier_init(shared_address(&shared.empty[i]),
                          Shape::kConsumers * 4 * (Shape::kByBlock ? 32 + kCluster - 1 : kCluster));
        }
        mbarrier_init_fence();
    }
    if constexpr (kCluster == 1) {
        __syncthreads();
    } else {
        cluster_sync();  // the others write here
    }
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // known to be the same for all lanes
    if (warpgroup == 0) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (warp == 0) {
            if (elect_one()) {
                produce<Shape, kTokensAreA, kN, kCluster>(args, shared, worker, rank);
            }
        } else if (Shape::kByBlock && warp == 1) {
            produce_scales<Shape, kTokensAreA, kN, kCluster>(args, shared, worker, rank);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        pdl_wait();
        const int group = warpgroup - 1;
        Consumer<T, kScales, kTokensAreA, kN, kCluster>{
            args,
            shared,
            worker,
            rank,
            group,
            static_cast<int>(threadIdx.x / 32 % 4),
            static_cast<int>(keep(threadIdx.x % 32)),
            keep(shared_address(shared.full)),
            keep(shared_address(shared.chunk_scales)),
            keep(descriptor_low(shared_address(shared.ring) + group * (64 * 128))),
            uniform((Shape::kABytes - group * (64 * 128)) >> 4),
            {}}
            .run();
    }
    if constexpr (kCluster > 1) {
        cluster_sync();  // no block ends while another one writes to it
    }
#endif
}

#undef FK_CLUSTER

template <typename T, MatmulScales kScales, int kTile>
void launch_tile(const MatmulArgs& args, int blocks, void* stream) {
    constexpr MatmulTile kT = kMatmulTiles[kTile];
    if constexpr (has_matmul_tile(kT, kMatmulDType<T>, kScales)) {
        using Shape = MatmulShape<T, kScales, kT.tokens_are_a, kT.columns, kT.cluster>;
        launch(matmul_sm90_kernel<T, kScales, kT.tokens_are_a, kT.columns, kT.cluster>,
               {.grid = dim3(blocks),
                .block = dim3(Shape::kThreads),
                .shared_bytes = sizeof(MatmulShared<Shape>),
                .pdl = true},
               stream, args);
    } else {
        fail("matmul: there is no tile ", kTile, ", tactics ", 2 * kTile, " and ", 2 * kTile + 1, ", for these types");
    }
}

}  // namespace

template <typename T, MatmulScales kScales>
void matmul_sm90_tile(const MatmulArgs& args, int tile, int blocks, void* stream) {
    switch (tile) {
        case 0: return launch_tile<T, kScales, 0>(args, blocks, stream);
        case 1: return launch_tile<T, kScales, 1>(args, blocks, stream);
        case 2: return launch_tile<T, kScales, 2>(args, blocks, stream);
        case 3: return launch_tile<T, kScales, 3>(args, blocks, stream);
        case 4: return launch_tile<T, kScales, 4>(args, blocks, stream);
        case 5: return launch_tile<T, kScales, 5>(args, blocks, stream);
        case 6: return launch_tile<T, kScales, 6>(args, blocks, stream);
        case 7: return launch_tile<T, kScales, 7>(args, blocks, stream);
        default: fail("matmul: there is no tile ", tile, ", only 0 to ", kNumMatmulTiles - 1);
    }
}

}  // namespace fastkernels
