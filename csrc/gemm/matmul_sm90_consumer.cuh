// A consumer warpgroup of matmul_sm90: 64 rows of A times a tile's columns, from wgmma to the stores of out.
#pragma once

#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/cp_async_mbarrier.cuh"
#include "common/ptx/load_shared.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/uniform.cuh"
#include "common/ptx/wgmma.cuh"
#include "gemm/matmul_sm90_shared.cuh"

namespace fastkernels {
namespace {

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

}  // namespace
}  // namespace fastkernels
