// Products of weight_only_few.cuh: weights become pairs of x's dtype, exactly, and tokens are B as they are, 8 of them
// (mma.sync m16n8k16, fp32 sums). Where x is e4m3, both become fp16.
#pragma once

#include "common/ptx/mma.cuh"
#include "common/ptx/mma_bytes.cuh"
#include "gemm/weight_only_formats.cuh"

namespace fastkernels {
namespace {

// The words of a piece, by an index that is known when it is compiled.
__device__ __forceinline__ uint32_t word_of(const uint4& piece, int index) {
    return index == 0 ? piece.x : index == 1 ? piece.y : index == 2 ? piece.z : piece.w;
}

// Twice 4 neighbours in e4m3 as fp16: of each word bytes 0 and 2, then 1 and 3, which are b0 and b1 of a product.
__device__ __forceinline__ uint4 pairs_of_bytes(uint32_t first, uint32_t second) {
    uint4 pairs;
    to_halves<__nv_fp8_e4m3>(first, pairs.x, pairs.y);
    to_halves<__nv_fp8_e4m3>(second, pairs.z, pairs.w);
    return pairs;
}

template <typename T, typename F>
struct Pairs {
    using Element = T;
    using Format = F;
    static constexpr int kTokens = 8, kLaneTokens = 2;
    static constexpr bool kEarly = false;
    static constexpr float kLeftOut = F::template kLeftOut<T>;

    struct Chunk {
        uint4 x[4];
    };

    __host__ __device__ static constexpr int slot_bytes(int num_tokens) {
        return num_tokens * kUnitSize * 2;
    }
    // Pieces of odd tokens are shifted by half of the banks.
    __device__ __forceinline__ static void put(char* slot, const uint4& x, int token, int piece, int num_tokens) {
        if (token < num_tokens) {
            *reinterpret_cast<uint4*>(slot + token * kUnitSize * 2 + (piece ^ token % 2 * 4) * 16) = x;
        }
    }
    // Tokens past the last repeat it and are not written.
    __device__ __forceinline__ static void load(Chunk& chunk, const char* slot, int g, int t, int num_tokens) {
        const int token = min(g, num_tokens - 1);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int piece = F::kTokenSteps == 1 ? step * 4 + t : step / 2 * 8 + t * 2 + step % 2;
            chunk.x[step] =
                *reinterpret_cast<const uint4*>(slot + token * kUnitSize * 2 + (piece ^ token % 2 * 4) * 16);
        }
    }
    __device__ __forceinline__ static void multiply(float2 (&sum)[2], const Chunk& chunk, const char* unit,
                                                    int my_piece, int g, int t) {
        constexpr bool kScaled = F::kScaleSteps > 0;
        const char* scales = unit + F::kPieces * 512;
        float all[4] = {sum[0].x, sum[1].x, sum[0].y, sum[1].y}, part[4] = {};
        uint4 piece;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (F::kPieces == 4 || step % 2 == 0) {
                piece = *reinterpret_cast<const uint4*>(unit + step * F::kPieces / 4 * 512 + my_piece);
            }
            uint32_t row_pair[2];
            F::template prepare<T>(row_pair, scales, step, g, t);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t a[4], b0, b1;
                F::template unpack<T>(piece, step, j, row_pair, a);
                if constexpr (F::kTokenSteps == 1) {
                    b0 = word_of(chunk.x[step], j * 2);
                    b1 = word_of(chunk.x[step], j * 2 + 1);
                } else {
                    b0 = word_of(chunk.x[step / 2 * 2], step % 2 * 2 + j);
                    b1 = word_of(chunk.x[step / 2 * 2 + 1], step % 2 * 2 + j);
                }
                mma_m16n8k16<T>(kScaled ? part : all, a, b0, b1);
            }
            if constexpr (kScaled) {
                if ((step + 1) % F::kScaleSteps == 0) {
                    const float2 scale = F::scale(scales, step / F::kScaleSteps, g);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        all[e] = fmaf(part[e], e < 2 ? scale.x : scale.y, all[e]);
                        part[e] = 0.0f;
                    }
                }
            }
        }
        sum[0] = {all[0], all[2]};
        sum[1] = {all[1], all[3]};
    }
};

// x in e4m3, which becomes fp16 on its way to the slot. Out: type of out.
template <typename Out, typename F>
struct PairsOfBytes : Pairs<fp16, F> {
    using Element = Out;

    // A lane has the words 2 of_k and 2 of_k + 1 along K: of step of_k / 4, those of two lanes t, for the same product.
    __device__ __forceinline__ static void put(char* slot, const uint4& x, int token, int of_k, int num_tokens) {
        if (token < num_tokens) {
            const uint4 pairs = pairs_of_bytes(x.x, x.y);
            const int piece = of_k / 4 * 4 + of_k % 2 * 2;
            char* to = slot + token * kUnitSize * 2 + (piece ^ token % 2 * 4) * 16 + of_k / 2 % 2 * 8;
            *reinterpret_cast<uint2*>(to) = {pairs.x, pairs.y};
            *reinterpret_cast<uint2*>(to + 16) = {pairs.z, pairs.w};
        }
    }
};

}  // namespace
}  // namespace fastkernels
