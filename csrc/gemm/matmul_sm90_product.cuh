// The sums of matmul_sm90: 64 rows of A times a tile's columns, by wgmma, from the ring that the producer fills.
#pragma once

#include "common/ptx/load_shared.cuh"
#include "common/ptx/mbarrier.cuh"
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

// kCluster: blocks that share B, and so each place of the ring.
template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster, typename Shape>
struct MatmulProduct {
    using Sum = WgmmaSum<T>;
    using TypeOfA = std::conditional_t<kTokensAreA, T, MatmulWeight<T>>;
    using TypeOfB = std::conditional_t<kTokensAreA, MatmulWeight<T>, T>;
    static constexpr int kSums = kN / 2;
    // Chunks that wgmma adds up by itself; 0: all.
    static constexpr int kPromote = !kIsFp8<T> || kN > 192           ? 0
                                    : kScales == MatmulScales::block ? 1
                                    : kTokensAreA                    ? 8
                                                                     : 4;

    const int rank, group, warp, lane;  // group: this warpgroup
    const uint32_t full;                // address of the barriers
    const uint32_t scales;              // and of the scales of chunks
    const uint32_t ring_a;              // low half of the descriptor of this warpgroup's A of slot 0
    const uint32_t a_to_b;              // what makes it that of B
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

    // sum += A B^T of the chunk in the ring, times its scales. Those of the weight are of three pieces, or one, or of a
    // gate and of up, whose eights of rows take turns.
    template <bool kGated>
    __device__ __forceinline__ void multiply_scaled(Sum (&sum)[kSums], Sum (&part)[kSums], uint32_t token_at) {
        wait_full();
        issue<true>(part);
        const uint32_t at = scales + ring.slot() * (Shape::kChunkScales * 4);
        constexpr int kPieces = kGated ? 2 : Shape::kPieces;
        constexpr int kFactors = kTokensAreA ? kPieces * 2 : kN / 4 * (kGated ? 2 : 1);
        float factor[kFactors];
        const float4 weight = load_shared_4(at + Shape::kTokens * 4);
        const float of_pieces[3] = {weight.x, weight.y, weight.z};
        if constexpr (kTokensAreA) {
            const float first = load_shared(at + token_at), second = load_shared(at + token_at + 8 * 4);
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                factor[i * 2] = first * of_pieces[i];
                factor[i * 2 + 1] = second * of_pieces[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kN / 8; ++i) {
                const float2 pair = load_shared_2(at + token_at + i * (8 * 4));
#pragma unroll
                for (int half = 0; half < (kGated ? 2 : 1); ++half) {
                    const int of = kGated ? i * 2 + half : i;
                    factor[of * 2] = pair.x * of_pieces[half];
                    factor[of * 2 + 1] = pair.y * of_pieces[half];
                }
            }
        }
        wgmma_wait<0>();
        wgmma_hold(part);
        release(ring.slot());
        ring.next();
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const int piece = kGated ? i / 4 % 2 : Shape::kPieces == 3 ? i / 32 : 0;
            const int at = kTokensAreA ? piece * 2 + i / 2 % 2 : kGated ? i : i / 4 * 2 + i % 2;
            sum[i] = fmaf(part[i], factor[at], sum[i]);
        }
    }

    // The sums of so many chunks. With kPromote, those of kPromote chunks at a time are added to fp32 registers.
    __device__ __forceinline__ void multiply_segment(Sum (&sum)[kSums], int chunks, [[maybe_unused]] bool gated) {
        if constexpr (kPromote == 0) {
            multiply(sum, chunks);
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
                // No tile of three pieces has a gate.
                if (gated && Shape::kPieces == 1) {
                    for (int i = 0; i < chunks; ++i) {
                        multiply_scaled<true>(sum, part, token_at);
                    }
                } else {
                    for (int i = 0; i < chunks; ++i) {
                        multiply_scaled<false>(sum, part, token_at);
                    }
                }
            } else {
                // The second warpgroup begins with half, so that one adds while the other multiplies.
                int left = chunks;
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
};

}  // namespace
}  // namespace fastkernels
