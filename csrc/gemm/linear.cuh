// out = x weight^T + bias for at most 16 tokens, on tensor cores (mma.sync, fp32 accumulators), at the speed of reading
// the weight.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]
//   T, of x and weight: bf16 | fp16, which bias and out have too, or with scales int8, e4m3, or of x e5m2 where the
//   weight is e4m3; K whole 16 bytes
//
// A block owns kRowTiles * 16 rows of the weight and all of K; its warps take chunks of 128 bytes along K in turn, so
// that the block reads kWarps * 128 bytes of a row at a time. The weight is the A operand and comes straight from
// memory to registers, kDepth chunks ahead: a lane's 16 bytes of a row are neighbours along K where the mma wants two
// words 16 bytes apart, which only renames the indices of the sum, since the tokens (the B operand) are read in the
// same order. The warps' sums meet in shared memory and are added in the order of the warps. Scales of a token and a
// row multiply the whole sum, scales of blocks (128 elements, a chunk) that of each chunk.
//
// In flight: kWarps * kDepth * kRowTiles * 2 KB a block. Bytes: the weight once; x once a block, from L2.
// Source: none; the layout trick is common to kernels that multiply straight from global memory.
#pragma once

#include <cuda_fp8.h>

#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/ptx/load_stream.cuh"
#include "common/ptx/mma_bytes.cuh"
#include "common/ptx/pdl.cuh"
#include "fastkernels/gemm.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

constexpr int kChunkBytes = 128;  // of a row, that a warp multiplies at a time

// One chunk's operands of a lane; g = lane / 4, t = lane % 4, and step s of 2 covers half of the chunk's bytes.
template <int kRowTiles, int kTokenTiles>
struct Chunk {
    uint4 weight[kRowTiles][2][2];  // [tile][half: row g or g + 8][s]: 16 bytes from s * 64 + t * 16
    uint4 x[kTokenTiles][2];        // [tile][s]: the same of token g
    float scale[kTokenTiles][2];    // of blocks: of tokens 2 t and 2 t + 1, times the weight's
};

template <typename T>
__device__ __forceinline__ void multiply_16(MatmulSum<T> (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kIsFp8<T>) {
#if __CUDA_ARCH__ >= 900
        mma_m16n8k32_fp8<MatmulWeight<T>, T>(sum, a, b0, b1);
#else
        uint32_t halves[2][4];
        to_halves<MatmulWeight<T> >(a, halves);
        mma_halves<T>(sum, halves, b0, b1);
#endif
    } else if constexpr (std::is_same_v<T, int8_t>) {
        mma_m16n8k32_int8(sum, a, b0, b1);
    } else {
        mma_m16n8k16<T>(sum, a, b0, b1);
    }
}

template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply(MatmulSum<T> (&sum)[kRowTiles][kTokenTiles][4],
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
                multiply_16<T>(sum[r][n], first, x.x, x.y);
                multiply_16<T>(sum[r][n], second, x.z, x.w);
            }
        }
    }
}

// Of blocks: the chunk's product, times its scales, is added in fp32.
template <typename T, MatmulScales kScales, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply_chunk(MatmulSum<T> (&sum)[kRowTiles][kTokenTiles][4],
                                               const Chunk<kRowTiles, kTokenTiles>& chunk) {
    if constexpr (kScales == MatmulScales::block) {
        float part[kRowTiles][kTokenTiles][4] = {};
        multiply<T>(part, chunk);
#pragma unroll
        for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
            const int r = i / (kTokenTiles * 4), n = i / 4 % kTokenTiles, e = i % 4;
            sum[r][n][e] = fmaf(part[r][n][e], chunk.scale[n][e % 2], sum[r][n][e]);
        }
    } else {
        multiply<T>(sum, chunk);
    }
}

__device__ __forceinline__ float to_float_of(const void* values, int64_t at, bool is_fp16) {
    return is_fp16 ? to_float(static_cast<const fp16*>(values)[at]) : to_float(static_cast<const bf16*>(values)[at]);
}

template <typename T, MatmulScales kScales, int kRowTiles, int kTokenTiles, int kWarps, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) linear_kernel(const MatmulParams p) {
    constexpr int kRows = kRowTiles * 16, kTokens = kTokenTiles * 8;
    constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T)), kStep = kChunk / 2,
                  kPiece = kStep / 4;  // elements
    using Sum = MatmulSum<T>;
    __shared__ Sum partial[kWarps][kTokens][kRows + 1];
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
            weight[r][half] = static_cast<const T*>(p.weight) + row * p.weight_row_stride + warp * kChunk + t * kPiece;
        }
    }
    const T* x[kTokenTiles];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        x[n] =
            static_cast<const T*>(p.x) + min(n * 8 + g, num_tokens - 1) * p.x_token_stride + warp * kChunk + t * kPiece;
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
                    chunk.weight[r][half][s] = load_stream_16(weight[r][half] + i * (kWarps * kChunk) + s * kStep);
                }
            }
        }
    };
    const int all_chunks = (in_size + kChunk - 1) / kChunk;
    const auto load_x = [&](Chunk<kRowTiles, kTokenTiles>& chunk, int i) {
        if constexpr (kScales == MatmulScales::block) {
            const int at = i * kWarps + warp;
            const float of_weight = p.weight_scales[first_row / 128 * all_chunks + at];
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = min(n * 8 + t * 2 + e, num_tokens - 1);
                    // Not __ldg: this kernel may have begun before the one that writes them.
                    chunk.scale[n][e] = of_weight * p.x_scales[static_cast<int64_t>(token) * all_chunks + at];
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                chunk.x[n][s] = *reinterpret_cast<const uint4*>(x[n] + i * (kWarps * kChunk) + s * kStep);
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

    Sum sum[kRowTiles][kTokenTiles][4] = {};
    for (int i = 0; i < mine; i += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            if (i + d < mine) {
                multiply_chunk<T, kScales>(sum, ring[d]);
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
            if (s * kStep + t * kPiece < rest) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    chunk.weight[r][0][s] = load_stream_16(weight[r][0] + at + s * kStep);
                    chunk.weight[r][1][s] = load_stream_16(weight[r][1] + at + s * kStep);
                }
#pragma unroll
                for (int n = 0; n < kTokenTiles; ++n) {
                    chunk.x[n][s] = *reinterpret_cast<const uint4*>(x[n] + at + s * kStep);
                }
            }
        }
        multiply<T>(sum, chunk);  // scales of blocks come with whole chunks
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
        Sum whole_sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            whole_sum += partial[w][token][i % kRows];
        }
        if (row < p.out_size) {
            if constexpr (std::is_same_v<T, int8_t>) {
                if (p.x_zeros != nullptr) {
                    whole_sum -= p.x_zeros[token] * p.weight_sums[row];
                }
            }
            float y = static_cast<float>(whole_sum);
            if constexpr (kScales == MatmulScales::channel) {
                y *= p.x_scales[token] * p.weight_scales[p.num_weight_scales == 1 ? 0 : row];
            }
            const bool is_fp16 = p.out_dtype == DType::f16;
            if (p.bias != nullptr) {
                y += to_float_of(p.bias, row, is_fp16);
            }
            const int64_t at = token * p.out_token_stride + row;
            if (is_fp16) {
                static_cast<fp16*>(p.out)[at] = from_float<fp16>(y);
            } else {
                static_cast<bf16*>(p.out)[at] = from_float<bf16>(y);
            }
        }
    }
}

template <typename T, MatmulScales kScales, int kTokenTiles, int kDepth>
void launch_linear(const MatmulParams& p, void* stream) {
    constexpr int kWarps = 8, kRows = 16;
    launch(linear_kernel<T, kScales, 1, kTokenTiles, kWarps, kDepth, 2>,
           {.grid = dim3(static_cast<unsigned>((p.out_size + kRows - 1) / kRows)),
            .block = dim3(kWarps * 32),
            .pdl = true},
           stream, p);
}

template <typename T, MatmulScales kScales>
void run_linear(const MatmulParams& p, void* stream) {
    p.num_tokens <= 8 ? launch_linear<T, kScales, 1, 3>(p, stream) : launch_linear<T, kScales, 2, 2>(p, stream);
}

}  // namespace
}  // namespace fastkernels
