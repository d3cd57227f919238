// out = x weight^T + bias for at most 16 tokens, on tensor cores (mma.sync, fp32 accumulators), at the speed of reading
// the weight.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]   bf16 | fp16; K a multiple of 8
//
// A block owns kRowTiles * 16 rows of the weight and all of K; its warps take chunks of 64 along K in turn, so that the
// block reads kWarps * 128 bytes of a row at a time. The weight is the A operand and comes straight from memory to
// registers, kDepth chunks ahead: a lane's 16 bytes of a row are 8 neighbours along K where the mma wants two pairs 8
// apart, which only renames the indices of the sum, since the tokens (the B operand) are read in the same order. The
// warps' sums meet in shared memory and are added in the order of the warps.
//
// In flight: kWarps * kDepth * kRowTiles * 2 KB a block. Bytes: the weight once; x once a block, from L2.
// Source: none; the layout trick is common to kernels that multiply straight from global memory.
#pragma once

#include "common/launch.h"
#include "common/ptx/load_stream.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "common/vec.cuh"
#include "fastkernels/gemm.h"

namespace fastkernels {
namespace {

constexpr int kChunk = 64;  // elements of K a warp multiplies at a time: 128 bytes of a row

// One chunk's operands of a lane; g = lane / 4, t = lane % 4, and step s of 2 covers 32 of the chunk's elements.
template <int kRowTiles, int kTokenTiles>
struct Chunk {
    uint4 weight[kRowTiles][2][2];  // [tile][half: row g or g + 8][s]: 8 elements from s * 32 + t * 8
    uint4 x[kTokenTiles][2];        // [tile][s]: the same of token g
};

template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply(float (&sum)[kRowTiles][kTokenTiles][4],
                                         const Chunk<kRowTiles, kTokenTiles>& chunk) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            const uint4 low = chunk.weight[r][0][s], high = chunk.weight[r][1][s];
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                const uint4 x = chunk.x[n][s];
                mma_m16n8k16<T>(sum[r][n], first, x.x, x.y);
                mma_m16n8k16<T>(sum[r][n], second, x.z, x.w);
            }
        }
    }
}

template <typename T, int kRowTiles, int kTokenTiles, int kWarps, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) linear_kernel(const LinearParams p) {
    constexpr int kRows = kRowTiles * 16, kTokens = kTokenTiles * 8;
    __shared__ float partial[kWarps][kTokens][kRows + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int in_size = static_cast<int>(p.in_size), num_tokens = static_cast<int>(p.num_tokens);
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;

    // Rows and tokens past the end repeat the last one and are not written.
    const T* weight[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = min(first_row + r * 16 + half * 8 + g, p.out_size - 1);
            weight[r][half] = static_cast<const T*>(p.weight) + row * p.weight_row_stride + warp * kChunk + t * 8;
        }
    }
    const T* x[kTokenTiles];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        x[n] = static_cast<const T*>(p.x) + min(n * 8 + g, num_tokens - 1) * p.x_token_stride + warp * kChunk + t * 8;
    }
    const int whole = in_size / kChunk;                     // chunks, of all warps
    const int mine = (whole - warp + kWarps - 1) / kWarps;  // of this warp: chunk i starts at i * kWarps * kChunk

    Chunk<kRowTiles, kTokenTiles> ring[kDepth];
    const auto load_weight = [&](Chunk<kRowTiles, kTokenTiles>& chunk, int i) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    chunk.weight[r][half][s] = load_stream_16(weight[r][half] + i * (kWarps * kChunk) + s * 32);
                }
            }
        }
    };
    const auto load_x = [&](Chunk<kRowTiles, kTokenTiles>& chunk, int i) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                chunk.x[n][s] = *reinterpret_cast<const uint4*>(x[n] + i * (kWarps * kChunk) + s * 32);
            }
        }
    };

    if (!p.constant_weight) {
        pdl_wait();
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
        if (d < mine) {
            load_weight(ring[d], d);
        }
    }
    pdl_wait();
    pdl_launch_dependents();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
        if (d < mine) {
            load_x(ring[d], d);
        }
    }

    float sum[kRowTiles][kTokenTiles][4] = {};
    for (int i = 0; i < mine; i += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            if (i + d < mine) {
                multiply<T>(sum, ring[d]);
            }
            if (i + d + kDepth < mine) {
                load_weight(ring[d], i + d + kDepth);
                load_x(ring[d], i + d + kDepth);
            }
        }
    }
    if (const int rest = in_size % kChunk; rest != 0 && warp == whole % kWarps) {  // zeros past the end of K
        Chunk<kRowTiles, kTokenTiles> chunk{};
        const int at = whole / kWarps * (kWarps * kChunk);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (s * 32 + t * 8 < rest) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    chunk.weight[r][0][s] = load_stream_16(weight[r][0] + at + s * 32);
                    chunk.weight[r][1][s] = load_stream_16(weight[r][1] + at + s * 32);
                }
#pragma unroll
                for (int n = 0; n < kTokenTiles; ++n) {
                    chunk.x[n][s] = *reinterpret_cast<const uint4*>(x[n] + at + s * 32);
                }
            }
        }
        multiply<T>(sum, chunk);
    }

    // --- The warps' sums ---------------------------------------------------------------------------------------------
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                partial[warp][n * 8 + t * 2 + e % 2][r * 16 + g + e / 2 * 8] = sum[r][n][e];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kRows; i += kWarps * 32) {
        const int token = i / kRows;
        const int64_t row = first_row + i % kRows;
        float y = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            y += partial[w][token][i % kRows];
        }
        if (row < p.out_size) {
            if (p.bias != nullptr) {
                y += to_float(static_cast<const T*>(p.bias)[row]);
            }
            static_cast<T*>(p.out)[token * p.out_token_stride + row] = from_float<T>(y);
        }
    }
}

template <typename T, int kRowTiles, int kTokenTiles, int kWarps, int kDepth, int kBlocks>
void launch_linear(const LinearParams& p, void* stream) {
    constexpr int kRows = kRowTiles * 16;
    launch(linear_kernel<T, kRowTiles, kTokenTiles, kWarps, kDepth, kBlocks>,
           {.grid = dim3(static_cast<unsigned>((p.out_size + kRows - 1) / kRows)),
            .block = dim3(kWarps * 32),
            .pdl = true},
           stream, p);
}

}  // namespace
}  // namespace fastkernels
