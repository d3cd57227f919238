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
//   Consumers, 2 warpgroups, 64 rows of A each: the product of a chunk is issued before that of the one
//   before is waited for. Out passes through shared memory, and from there by TMA, which keeps to the matrix's edges.
// Sums are fp32, and int32 of int8, which zero points of x, times the sums of the weight's rows, are taken off. wgmma
// adds up fp8 with about 14 bits: sums of 4 chunks, of one where blocks have scales, are added to fp32 registers where
// there is room for both, that is, but for tiles of 256 columns.
// A tile that is cut along K: every warpgroup leaves its part in the workspace, and who comes last adds the parts up in
// their order, so nobody waits, and the same bits come out whoever it is.
//
// FLOPs: 2 * K an element of out. Bytes: from L2, kN rows of B a cluster and tile, 128 rows of A a block and tile.
// Source: NVIDIA's CUTLASS (tiles, clusters), Zhao et al. 2025 (DeepGEMM: scales of blocks).
#pragma once

#include <cuda_fp8.h>

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "gemm/matmul_sm90.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

template <typename T, bool kTokensAreA, int kN, int kCluster>
struct MatmulShape {
    static constexpr int kConsumers = 2;  // warpgroups
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kElements = 128 / static_cast<int>(sizeof(T));  // of a chunk
    static constexpr int kABytes = kMatmulRows * 128, kBBytes = kN * 128, kSlotBytes = kABytes + kBBytes;
    // Of out, as a warpgroup hands it to TMA: panels of 64 elements, two in turn.
    static constexpr int kPanels = kTokensAreA ? 2 : 1;
    static constexpr int kPanelBytes = (kTokensAreA ? 64 : kN) * 128;
    static constexpr int kOutBytes = kConsumers * kPanels * kPanelBytes;
    static constexpr int kMostBytes = 227 * 1024;
    static constexpr int kSlots = (kMostBytes - 1024 - kOutBytes) / kSlotBytes;
    static constexpr int kSharedBytes = kSlots * kSlotBytes + kOutBytes + 1024;
    // 65,536 a block
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

template <typename Shape>
struct MatmulShared {
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];  // A, then B
    alignas(1024) unsigned char out[Shape::kConsumers][Shape::kPanels * Shape::kPanelBytes];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];
    int is_last[Shape::kConsumers], others_done[Shape::kConsumers];  // of a tile that is cut
};

// A place in the ring and the parity of its phase.
template <int kSlots>
struct RingPlace {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// --- Producer --------------------------------------------------------------------------------------------------------

template <typename Shape, bool kTokensAreA, int kN, int kCluster>
__device__ __forceinline__ void produce(const MatmulArgs& args, MatmulShared<Shape>& shared, int worker, int rank) {
    constexpr int kColumns = kN / kCluster;  // of B that this block loads
    const MatmulSchedule& schedule = args.schedule;
    // Of few tokens the weight passes through L2 once; x and the parts of tiles are to stay there.
    constexpr uint64_t kWeightPolicy = kTokensAreA ? kEvictNormal : kEvictFirst, kXPolicy = kEvictNormal;

    const auto load_a = [&](int slot, const MatmulPlace& place, int chunk) {
        tma_load(shared_address(shared.ring[slot]), args.a_map, chunk * Shape::kElements,
                 (place.a * kCluster + rank) * kMatmulRows, shared_address(&shared.full[slot]),
                 kTokensAreA ? kXPolicy : kWeightPolicy);
    };
    const auto load_b = [&](int slot, const MatmulPlace& place, int chunk) {
        const uint32_t b = shared_address(shared.ring[slot]) + Shape::kABytes + rank * (kColumns * 128);
        const int x = chunk * Shape::kElements, y = place.b * kN + rank * kColumns;
        const uint32_t full = shared_address(&shared.full[slot]);
        constexpr uint64_t kPolicy = kTokensAreA ? kWeightPolicy : kXPolicy;
        if constexpr (kCluster == 1) {
            tma_load(b, args.b_map, x, y, full, kPolicy);
        } else {
            tma_load_multicast(b, args.b_map, x, y, full, (1 << kCluster) - 1, kPolicy);
        }
    };
    const auto load_weight = [&](int slot, const MatmulPlace& place, int chunk) {
        // Both operands' bytes, this block's and the others', are announced at once.
        mbarrier_arrive_expect_bytes(shared_address(&shared.full[slot]), Shape::kSlotBytes);
        if constexpr (kTokensAreA) {
            load_b(slot, place, chunk);
        } else {
            load_a(slot, place, chunk);
        }
    };
    const auto load_x = [&](int slot, const MatmulPlace& place, int chunk) {
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
                mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
                load_weight(ring.slot, place, chunk);
            }
            load_x(ring.slot, place, chunk);
            ring.next();
        }
    }
}

// --- Consumers -------------------------------------------------------------------------------------------------------

// Scales of one chunk that a thread needs: of the tokens that are its rows of D, two, or its columns; and of the
// weight, whose 192 rows lie in two blocks of 128.
template <bool kTokensAreA, int kN>
struct ChunkScales {
    static constexpr int kTokens = kTokensAreA ? 2 : kN / 4, kWeights = kTokensAreA && kN > 128 ? 2 : 1;
    float weight[kWeights], token[kTokens];
};

__device__ __forceinline__ uint32_t pack_out(float low, float high, bool is_fp16) {
    if (is_fp16) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
struct Consumer {
    using Shape = MatmulShape<T, kTokensAreA, kN, kCluster>;
    using Sum = WgmmaSum<T>;
    using TypeOfA = std::conditional_t<kTokensAreA, T, MatmulWeight<T>>;
    using TypeOfB = std::conditional_t<kTokensAreA, MatmulWeight<T>, T>;
    static constexpr int kSums = kN / 2;
    using Scales = ChunkScales<kTokensAreA, kN>;
    // Chunks that wgmma adds up by itself; 0: all. Of wide tiles one: the warpgroups take turns (below), so that one
    // adds while the other multiplies, and a turn of one chunk needs the fewest places in the ring.
    static constexpr int kPromote = !kIsFp8<T> || kN > 192 ? 0 : kTokensAreA || kScales == MatmulScales::block ? 1 : 4;
    static constexpr bool kTakesTurns = kPromote == 1 && kTokensAreA;

    const MatmulArgs& args;
    MatmulShared<Shape>& shared;
    const int worker, rank, group, warp, lane;  // group: this warpgroup
    RingPlace<Shape::kSlots> ring;

    __device__ __forceinline__ void release(int slot) {
        if constexpr (kCluster == 1) {
            if (lane == 0) {
                mbarrier_arrive(shared_address(&shared.empty[slot]));
            }
        } else if (lane < kCluster) {
            mbarrier_arrive_in_block(shared_address(&shared.empty[slot]), lane);
        }
    }

    __device__ __forceinline__ void wait_full() {
        mbarrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    }

    template <bool kFirst>
    __device__ __forceinline__ void issue(Sum (&sum)[kSums]) {
        const uint32_t slot = shared_address(shared.ring[ring.slot]);
        const uint64_t a = wgmma_k_major(slot + group * (64 * 128));
        const uint64_t b = wgmma_k_major(slot + Shape::kABytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            wgmma_ss<TypeOfA, kN, TypeOfB>(sum, a + k * (32 >> 4), b + k * (32 >> 4), !kFirst || k > 0);
        }
        wgmma_commit();
    }

    // sum = A B^T of so many chunks, the next in the ring. The first is apart, for the compiler's sake: it would order
    // the loop's wgmmas behind each other if what they add to came from elsewhere.
    __device__ __forceinline__ void multiply(Sum (&sum)[kSums], int chunks) {
        wait_full();
        issue<true>(sum);
        int slot = ring.slot;
        ring.next();
        for (int i = 1; i < chunks; ++i) {
            wait_full();
            issue<false>(sum);
            wgmma_wait<1>();
            release(slot);
            slot = ring.slot;
            ring.next();
        }
        wgmma_wait<0>();
        wgmma_hold(sum);
        release(slot);
    }

    // Row of A of this warpgroup's first row.
    __device__ __forceinline__ int first_row(const MatmulPlace& place) const {
        return (place.a * kCluster + rank) * kMatmulRows + group * 64;
    }

    __device__ __forceinline__ Scales chunk_scales(const MatmulPlace& place, int chunk) const {
        const int chunks = args.schedule.chunks, last_token = args.num_tokens - 1;
        const int weight_row = kTokensAreA ? place.b * kN : first_row(place);
        Scales scales;
#pragma unroll
        for (int i = 0; i < Scales::kWeights; ++i) {
            const int block = min(weight_row / 128 + i, (args.out_size - 1) / 128);
            scales.weight[i] = args.weight_scales[block * chunks + chunk];
        }
        const int first = kTokensAreA ? first_row(place) + warp * 16 + lane / 4 : place.b * kN + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < Scales::kTokens; ++i) {
            const int token = min(first + (kTokensAreA ? i * 8 : i / 2 * 8 + i % 2), last_token);
            // Not __ldg: this kernel may have begun before the one that writes them.
            scales.token[i] = args.token_scales[static_cast<int64_t>(token) * chunks + chunk];
        }
        return scales;
    }

    // sum += part, which is of one chunk, times the scales.
    __device__ __forceinline__ void add_scaled(Sum (&sum)[kSums], const Sum (&part)[kSums], const Scales& scales,
                                               const MatmulPlace& place) {
        // Of 192 columns the first 64 lie in one block of the weight's rows, the last 64 in the next, and those between
        // in the one or the other.
        constexpr int kThirds = Scales::kWeights == 2 ? 3 : 1;
        float factor[kThirds][Scales::kTokens];
#pragma unroll
        for (int third = 0; third < kThirds; ++third) {
            const bool second = third == 2 || (third == 1 && place.b % 2 == 1);
#pragma unroll
            for (int i = 0; i < Scales::kTokens; ++i) {
                factor[third][i] = scales.token[i] * (second ? scales.weight[Scales::kWeights - 1] : scales.weight[0]);
            }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const int token = kTokensAreA ? i / 2 % 2 : i / 4 * 2 + i % 2;
            sum[i] = fmaf(part[i], factor[kThirds == 3 ? i / 32 : 0][token], sum[i]);
        }
    }

    static __device__ __forceinline__ void add(Sum (&sum)[kSums], const Sum (&part)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            sum[i] += part[i];
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
            if constexpr (kPromote == 1) {
                multiply_by_chunk(sum, segment);
            } else {
                Sum part[kSums];
                for (int chunk = segment.begin; chunk < segment.end; chunk += kPromote) {
                    multiply(part, min(kPromote, segment.end - chunk));
                    add(sum, part);
                }
            }
        }
    }

    __device__ __forceinline__ void multiply_by_chunk(Sum (&sum)[kSums], const MatmulSegment& segment) {
        constexpr bool kScaled = kScales == MatmulScales::block;
        const MatmulPlace place = args.schedule.place(segment.tile);
        Sum part[kSums];
        Scales next;
        if constexpr (kScaled) {
            next = chunk_scales(place, segment.begin);
        }
        for (int chunk = segment.begin; chunk < segment.end; ++chunk) {
            const Scales scales = next;
            if constexpr (kScaled) {
                next = chunk_scales(place, min(chunk + 1, segment.end - 1));
            }
            wait_full();
            await_turn();
            issue<true>(part);
            pass_turn();
            wgmma_wait<0>();
            wgmma_hold(part);
            release(ring.slot);
            if constexpr (kScaled) {
                add_scaled(sum, part, scales, place);
            } else {
                add(sum, part);
            }
            ring.next();
        }
    }

    // Left to themselves the two warpgroups' products alternate one by one, end together, and the tensor cores wait
    // while both add. In turns the first has ended, and has added, while the second's are under way.
    __device__ __forceinline__ void await_turn() const {
        if constexpr (kTakesTurns) {
            named_barrier_sync(3 + group, 256);
        }
    }
    __device__ __forceinline__ void pass_turn() const {
        if constexpr (kTakesTurns) {
            named_barrier_arrive(3 + (group ^ 1), 256);
        }
    }

    __device__ __forceinline__ void sync_group() const {
        named_barrier_sync(1 + group, 128);
    }

    // Of a tile that is cut: leaves this warpgroup's part in the workspace. The last to come gets the whole sum, the
    // parts added in the order of the workers, its own read back among them. Only the first worker, whose part the sum
    // begins with, keeps it in registers if the others are done by then, which is the rule where two share a tile.
    __device__ __forceinline__ bool add_parts(Sum (&sum)[kSums], const MatmulSegment& segment) {
        constexpr int kVectors = kSums / 4;
        const MatmulSchedule& schedule = args.schedule;
        const int thread = threadIdx.x % 128;
        const int first = schedule.first_worker(segment.tile), last = schedule.last_worker(segment.tile);
        const auto others = static_cast<unsigned>(last - first);
        unsigned* counter = args.counters + (segment.tile * kCluster + rank) * Shape::kConsumers + group;
        const auto part = [&](int of) {
            const int slot = (of * kCluster + rank) * 2 + (of == first ? 1 : 0);
            return reinterpret_cast<uint4*>(args.partials + static_cast<int64_t>(slot) * (kN * kMatmulRows) +
                                            group * (kN * 64)) +
                   thread;
        };
        bool is_whole = false;
        if (worker == first) {
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
            uint4* mine = part(worker);
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
            const uint4* begin = part(first);
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
        for (int of = first + 1; of <= last; ++of) {
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
    __device__ __forceinline__ float weight_scale(int row) const {
        return kScales == MatmulScales::channel
                   ? args.weight_scales[min(row, args.out_size - 1) * args.weight_scale_stride]
                   : 1.0f;
    }
    __device__ __forceinline__ float token_scale(int token) const {
        return kScales == MatmulScales::channel ? args.token_scales[min(token, args.num_tokens - 1)] : 1.0f;
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
        float scale[2];
        Sum zero[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            scale[half] = token_scale(token + warp * 16 + lane / 4 + half * 8);
            zero[half] = token_zero(token + warp * 16 + lane / 4 + half * 8);
        }
#pragma unroll
        for (int pass = 0; pass < kN / 64; ++pass) {
            const uint32_t panel = shared_address(shared.out[group]) + pass % 2 * Shape::kPanelBytes;
            if (threadIdx.x % 128 == 0) {
                if (pass == 0 && kN / 64 % 2 == 1) {  // the panel of the last pass before
                    tma_store_wait_read<0>();
                } else {
                    tma_store_wait_read<1>();
                }
            }
            sync_group();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t pairs[4];
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const int column = row + pass * 64 + i * 16 + tile * 8 + lane % 4 * 2;
                    const Sum* d = sum + pass * 32 + i * 8 + tile * 4;
                    const float factor[2] = {weight_scale(column), weight_scale(column + 1)};
                    const float more[2] = {bias(column), bias(column + 1)};
                    const Sum row_sum[2] = {weight_sum(column), weight_sum(column + 1)};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const Sum low = d[half * 2] - zero[half] * row_sum[0];
                        const Sum high = d[half * 2 + 1] - zero[half] * row_sum[1];
                        pairs[tile * 2 + half] =
                            pack_out(finish(low, scale[half] * factor[0], more[0]),
                                     finish(high, scale[half] * factor[1], more[1]), args.out_is_fp16);
                    }
                }
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
        float factor[2], more[2];
        Sum row_sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            factor[half] = weight_scale(row + warp * 16 + lane / 4 + half * 8);
            more[half] = bias(row + warp * 16 + lane / 4 + half * 8);
            row_sum[half] = weight_sum(row + warp * 16 + lane / 4 + half * 8);
        }
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read<0>();
        }
        sync_group();
#pragma unroll
        for (int i = 0; i < kN / 16; ++i) {
            uint32_t pairs[4];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const int column = token + i * 16 + tile * 8 + lane % 4 * 2;
                const Sum* d = sum + i * 8 + tile * 4;
                const float scale[2] = {token_scale(column), token_scale(column + 1)};
                const Sum zero[2] = {token_zero(column), token_zero(column + 1)};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Sum low = d[half * 2] - zero[0] * row_sum[half];
                    const Sum high = d[half * 2 + 1] - zero[1] * row_sum[half];
                    pairs[tile * 2 + half] =
                        pack_out(finish(low, scale[0] * factor[half], more[half]),
                                 finish(high, scale[1] * factor[half], more[half]), args.out_is_fp16);
                }
            }
            const uint32_t address =
                panel + (i * 16 + lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
            stmatrix_x4_transposed(address, pairs[0], pairs[1], pairs[2], pairs[3]);
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
        if (group == 1) {
            pass_turn();  // the first is the other's
        }
        while (walk.next(schedule, segment)) {
            Sum sum[kSums];
            multiply_segment(sum, segment);
            if (segment.end - segment.begin == schedule.chunks || add_parts(sum, segment)) {
                const MatmulPlace place = schedule.place(segment.tile);
                if constexpr (kTokensAreA) {
                    store_rows(sum, first_row(place), place.b * kN);
                } else {
                    store_columns(sum, place.b * kN, first_row(place));
                }
            }
        }
        if (group == 0) {
            await_turn();
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
__global__ void FK_CLUSTER(kCluster) __launch_bounds__(MatmulShape<T, kTokensAreA, kN, kCluster>::kThreads, 1)
    matmul_sm90_kernel(const __grid_constant__ MatmulArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = MatmulShape<T, kTokensAreA, kN, kCluster>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    MatmulShared<Shape>& shared = *reinterpret_cast<MatmulShared<Shape>*>(shared_bytes);
    static_assert(sizeof(MatmulShared<Shape>) == Shape::kSharedBytes && Shape::kSlots >= 3);
    const int rank = kCluster == 1 ? 0 : cluster_rank(), worker = blockIdx.x / kCluster;

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.a_map);
        tma_prefetch_map(args.b_map);
        tma_prefetch_map(args.out_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), Shape::kConsumers * 4 * kCluster);
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
        if (threadIdx.x == 0) {
            produce<Shape, kTokensAreA, kN, kCluster>(args, shared, worker, rank);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        pdl_wait();
        Consumer<T, kScales, kTokensAreA, kN, kCluster>{args,
                                                        shared,
                                                        worker,
                                                        rank,
                                                        warpgroup - 1,
                                                        static_cast<int>(threadIdx.x / 32 % 4),
                                                        static_cast<int>(threadIdx.x % 32),
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
        using Shape = MatmulShape<T, kT.tokens_are_a, kT.columns, kT.cluster>;
        launch(matmul_sm90_kernel<T, kScales, kT.tokens_are_a, kT.columns, kT.cluster>,
               {.grid = dim3(blocks), .block = dim3(Shape::kThreads), .shared_bytes = Shape::kSharedBytes, .pdl = true},
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
