// out = x weight^T + bias for at most 8 tokens, on tensor cores (mma.sync, fp32 accumulators), at the speed of reading
// the weight. Of one token and a weight of bytes also the norm before a product, which every block computes for itself,
// and the addition behind it.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]
//   T, of x and weight: bf16 | fp16, which bias and out have too, or with scales int8, e4m3, or of x e5m2 where the
//   weight is e4m3; K whole 16 bytes
//
// A block owns 16 rows of the weight and all of K; its warps take chunks of 128 bytes along K in turn, so that the
// block reads kWarps * 128 bytes of a row at a time. The weight is the A operand. cp.async brings it to shared memory,
// kDepth chunks ahead, where each lane has places of its own and waits for no other: a lane's 16 bytes of a row are
// neighbours along K where the mma wants two words 16 bytes apart, which only renames the indices of the sum, since the
// tokens (the B operand) are read in the same order, kAhead chunks ahead, into registers. The warps' sums meet in
// shared memory and are added in the order of the warps. Scales of a token and a row multiply the whole sum, scales of
// blocks (128 elements, a chunk) that of each chunk. Gated, a block owns 8 rows of the gate and the same 8 of up.
// A row to be normalised is read after pdl_wait(), while the weight's first chunks are on their way, kept in registers
// until its sums are there, and rounded to bytes in shared memory.
//
// Shared memory and not registers, since loads to registers in flight are kept in L1: how much of it there is depends
// on the shared memory of whatever kernel the SM ran before (docs/kernels/gemm.md).
//
// In flight: kWarps * kDepth * 2 KB a block. Bytes: the weight once; x once a block, from L2.
// Source: none; the layout trick is common to kernels that multiply straight from global memory.
#pragma once

#include <cuda_fp8.h>

#include <algorithm>

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/load_stream.cuh"
#include "common/ptx/mma_bytes.cuh"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "fastkernels/token_linear.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

constexpr int kChunkBytes = 128;  // of a row, that a warp multiplies at a time

constexpr int kPieces = 4;  // of 16 bytes, that a lane has of a chunk of the weight

// One chunk's operands of a lane; g = lane / 4, t = lane % 4, and step s of 2 covers half of the chunk's bytes.
struct WeightChunk {
    uint4 piece[kPieces];  // 2 s + half: of row g + 8 half, the 16 bytes from s * 64 + t * 16
};
struct TokenChunk {
    uint4 x[2];      // [s]: the same of token g
    float scale[2];  // of blocks: of tokens 2 t and 2 t + 1, times the weight's
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

template <typename T>
__device__ __forceinline__ void multiply(MatmulSum<T> (&sum)[4], const WeightChunk& weight, const TokenChunk& tokens) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const uint4 low = weight.piece[2 * s], high = weight.piece[2 * s + 1];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
        const uint4 x = tokens.x[s];
        multiply_16<T>(sum, first, x.x, x.y);
        multiply_16<T>(sum, second, x.z, x.w);
    }
}

// Of blocks: the chunk's product, times its scales, is added in fp32.
template <typename T, MatmulScales kScales>
__device__ __forceinline__ void multiply_chunk(MatmulSum<T> (&sum)[4], const WeightChunk& weight,
                                               const TokenChunk& tokens) {
    if constexpr (kScales == MatmulScales::block) {
        float part[4] = {};
        multiply<T>(part, weight, tokens);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i] = fmaf(part[i], tokens.scale[i % 2], sum[i]);
        }
    } else {
        multiply<T>(sum, weight, tokens);
    }
}

__device__ __forceinline__ float to_float_of(const void* values, int64_t at, bool is_fp16) {
    return is_fp16 ? to_float(static_cast<const fp16*>(values)[at]) : to_float(static_cast<const bf16*>(values)[at]);
}

constexpr int kRows = 16, kTokens = 8, kWarps = 8;

// Bytes of x / sqrt(mean(x^2) + eps) * norm_weight, x the row of one token of type F, to shared memory; returns their
// scale. Every thread of the block calls it, and what it has in flight goes on.
template <typename T, typename F>
__device__ __forceinline__ float normalise_row(T* row, const MatmulParams& p, const TokenNorm& norm) {
    constexpr int kVec = 8, kThreads = kWarps * 32, kPieces = kTokenLinearMaxSize / (kVec * kThreads);
    __shared__ float sums[kWarps], maxima[kWarps];
    const int num_pieces = static_cast<int>(p.in_size) / kVec, warp = threadIdx.x / 32;
    const auto piece_of = [](int j) { return j * kThreads + static_cast<int>(threadIdx.x); };
    const auto load = [&](const void* from, Vec<F, kVec>(&pieces)[kPieces]) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            pieces[j] = piece_of(j) < num_pieces ? load_vec<kVec>(static_cast<const F*>(from) + piece_of(j) * kVec)
                                                 : Vec<F, kVec>{};
        }
    };
    Vec<F, kVec> x[kPieces], weights[kPieces];
    load(norm.weight, weights);  // a constant of the engine, as the weight is
    pdl_wait();
    pdl_launch_dependents();
    load(p.x, x);
    float sum = 0.0f, largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        float a[kVec], b[kVec];
        to_floats(x[j], a);
        to_floats(weights[j], b);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            sum = fmaf(a[i], a[i], sum);
            largest = fmaxf(largest, fabsf(a[i] * b[i]));
        }
        forget(x[j]);
    }
    sum = warp_sum(sum);
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) {
        sums[warp] = sum;
        maxima[warp] = largest;
    }
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        sum += sums[w];
        largest = fmaxf(largest, maxima[w]);
    }
    const float factor = rsqrtf(sum / static_cast<float>(p.in_size) + norm.eps);
    const float scale = byte_scale_of<T>(largest * factor), inverse_scale = 1.0f / scale;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        float a[kVec], b[kVec];
        to_floats(x[j], a);
        to_floats(weights[j], b);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            a[i] = a[i] * factor * b[i];
        }
        if (piece_of(j) < num_pieces) {
            store_quantized(row + piece_of(j) * kVec, a, inverse_scale);
        }
    }
    __syncthreads();
    return scale;
}

template <typename T, MatmulScales kScales, bool kNormed, int kDepth, int kAhead, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    linear_kernel(const MatmulParams p, const TokenNorm norm, bool adds) {
    constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T)), kStep = kChunk / 2,
                  kPiece = kStep / 4;  // elements
    static_assert(kDepth % kAhead == 0);
    using Sum = MatmulSum<T>;
    // [warp][chunk of the ring][piece][lane]; in the end the warps' sums
    extern __shared__ __align__(16) uint4 ring[];
    constexpr int kWarpPieces = kDepth * kPieces * 32;
    static_assert(kTokens * (kRows + 1) * sizeof(Sum) <= kWarpPieces * sizeof(uint4));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int in_size = static_cast<int>(p.in_size), num_tokens = static_cast<int>(p.num_tokens);
    const bool gated = kScales == MatmulScales::none && p.gated;
    const int out_rows = gated ? kRows / 2 : kRows;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * out_rows;

    // Rows and tokens past the end repeat the last one and are not written. The pointers move along K with the loop.
    const T* weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row =
            min(first_row + (gated ? 0 : half * 8) + g, p.out_size - 1) + (gated ? half * p.out_size : 0);
        weight[half] = static_cast<const T*>(p.weight) + row * p.weight_row_stride + warp * kChunk + t * kPiece;
    }
    const T* x = static_cast<const T*>(p.x) + min(g, num_tokens - 1) * p.x_token_stride + warp * kChunk + t * kPiece;
    const int whole = in_size / kChunk;                     // chunks, of all warps
    const int mine = (whole - warp + kWarps - 1) / kWarps;  // of this warp: chunk i starts at i * kWarps * kChunk
    uint4* const own = ring + warp * kWarpPieces + lane;

    // Chunk `ahead` from where the pointers are, to place d of the ring.
    const auto load_weight = [&](int d, int ahead) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            cp_async_16(shared_address(own + (d * kPieces + piece) * 32),
                        weight[piece % 2] + ahead * (kWarps * kChunk) + piece / 2 * kStep, true);
        }
    };
    const int all_chunks = (in_size + kChunk - 1) / kChunk;
    const auto load_tokens = [&](TokenChunk& tokens, int i, int ahead) {
        if constexpr (kScales == MatmulScales::block) {
            const int at = (i + ahead) * kWarps + warp;
            const float of_weight = p.weight_scales[first_row / 128 * all_chunks + at];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = min(t * 2 + e, num_tokens - 1);
                // Not __ldg: this kernel may have begun before the one that writes them.
                tokens.scale[e] = of_weight * p.x_scales[static_cast<int64_t>(token) * all_chunks + at];
            }
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            tokens.x[s] = *reinterpret_cast<const uint4*>(x + ahead * (kWarps * kChunk) + s * kStep);
        }
    };

    if (!p.constant_weight) {
        pdl_wait();
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
        if (d < mine) {
            load_weight(d, d);
        }
        cp_async_commit();
    }
    float x_scale = 1.0f;  // of one token
    if constexpr (kNormed) {
        T* const row = reinterpret_cast<T*>(ring + kWarps * kWarpPieces);
        x_scale =
            p.out_dtype == DType::f16 ? normalise_row<T, fp16>(row, p, norm) : normalise_row<T, bf16>(row, p, norm);
        x = row + warp * kChunk + t * kPiece;
    } else {
        pdl_wait();
        pdl_launch_dependents();
        if (kScales == MatmulScales::channel) {
            x_scale = p.x_scales[0];
        }
    }
    // What the product is added to, before anything waits for it. The blocks read and write parts of their own.
    const bool is_fp16 = p.out_dtype == DType::f16;
    float before = 0.0f;
    if (adds && threadIdx.x < out_rows && first_row + threadIdx.x < p.out_size) {
        before = to_float_of(p.out, first_row + threadIdx.x, is_fp16);
    }
    TokenChunk tokens[kAhead];
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
        if (d < mine) {
            load_tokens(tokens[d], 0, d);
        }
    }

    Sum sum[4] = {};
    int i = 0;
    for (; i < mine; i += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            cp_async_wait<kDepth - 1>();
            if (i + d < mine) {
                WeightChunk chunk;
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    chunk.piece[piece] = own[(d * kPieces + piece) * 32];
                }
                multiply_chunk<T, kScales>(sum, chunk, tokens[d % kAhead]);
            }
            if (i + d + kDepth < mine) {
                load_weight(d, d + kDepth);
            }
            cp_async_commit();
            if (i + d + kAhead < mine) {
                load_tokens(tokens[d % kAhead], i, d + kAhead);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weight[half] += kDepth * kWarps * kChunk;
        }
        x += kDepth * kWarps * kChunk;
    }
    if (const int rest = in_size % kChunk; rest != 0 && warp == whole % kWarps) {  // zeros past the end of K
        WeightChunk chunk{};
        TokenChunk last{};
        const int at = (whole / kWarps - i) * (kWarps * kChunk);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (s * kStep + t * kPiece < rest) {
                chunk.piece[2 * s] = load_stream_16(weight[0] + at + s * kStep);
                chunk.piece[2 * s + 1] = load_stream_16(weight[1] + at + s * kStep);
                last.x[s] = *reinterpret_cast<const uint4*>(x + at + s * kStep);
            }
        }
        multiply<T>(sum, chunk, last);  // scales of blocks come with whole chunks
    }

    // --- The warps' sums, each where its ring was --------------------------------------------------------------------
    const auto partial = [&](int w, int token, int row) -> Sum& {
        return reinterpret_cast<Sum*>(ring + w * kWarpPieces)[token * (kRows + 1) + row];
    };
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        partial(warp, t * 2 + e % 2, g + e / 2 * 8) = sum[e];
    }
    __syncthreads();
    const auto whole_sum = [&](int token, int row) {
        Sum added = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            added += partial(w, token, row);
        }
        return added;
    };
    for (int i = threadIdx.x; i < num_tokens * out_rows; i += kWarps * 32) {
        const int token = i / out_rows;
        const int64_t row = first_row + i % out_rows;
        if (row < p.out_size) {
            Sum sum_of_row = whole_sum(token, i % out_rows);
            if constexpr (std::is_same_v<T, int8_t>) {
                if (p.x_zeros != nullptr) {
                    sum_of_row -= p.x_zeros[token] * p.weight_sums[row];
                }
            }
            float y = static_cast<float>(sum_of_row);
            if (gated) {
                y = __fdividef(y, 1.0f + __expf(-y)) * static_cast<float>(whole_sum(token, kRows / 2 + i % out_rows));
            }
            if constexpr (kScales == MatmulScales::channel) {
                y *= (token == 0 ? x_scale : p.x_scales[token]) * p.weight_scales[p.num_weight_scales == 1 ? 0 : row];
            }
            if (p.bias != nullptr) {
                y += to_float_of(p.bias, row, is_fp16);
            }
            const int64_t at = token * p.out_token_stride + row;
            const auto write = [&]<typename Out>(Out* out) {
                if (adds) {
                    y = to_float(from_float<Out>(y)) + before;  // rounded as where a norm adds it
                }
                out[at] = from_float<Out>(y);
            };
            is_fp16 ? write(static_cast<fp16*>(p.out)) : write(static_cast<bf16*>(p.out));
        }
    }
}

template <typename T, MatmulScales kScales, bool kNormed, int kDepth, int kAhead, int kBlocks>
void launch_linear(const MatmulParams& p, const TokenNorm& norm, bool adds, unsigned blocks, size_t least_shared_bytes,
                   void* stream) {
    const size_t ring_bytes = kWarps * kDepth * kPieces * 32 * sizeof(uint4);
    const size_t row_bytes = kNormed ? static_cast<size_t>(p.in_size) : 0;
    launch(linear_kernel<T, kScales, kNormed, kDepth, kAhead, kBlocks>,
           {.grid = dim3(blocks),
            .block = dim3(kWarps * 32),
            .shared_bytes = std::max(ring_bytes + row_bytes, least_shared_bytes),
            .pdl = true},
           stream, p, norm, adds);
}

// So much that no SM takes three blocks, but has room for blocks of the kernels behind this one.
constexpr size_t kThirdOfAnSm = 77 * 1024;

// Up to 8 tokens. Three blocks an SM; two, with more in flight, where there are no more than that: of three, some SMs
// would get all. Of bytes a block reads half as much, and the next kernels' first loads are worth more than its own.
template <typename T, MatmulScales kScales, bool kNormed = false>
void run_linear(const MatmulParams& p, void* stream, const TokenNorm& norm = {}, bool adds = false) {
    const auto blocks = static_cast<unsigned>((p.out_size * (p.gated ? 2 : 1) + kRows - 1) / kRows);
    const bool few = blocks <= 2u * static_cast<unsigned>(num_sms());
    if constexpr (sizeof(T) == 1) {
        few ? launch_linear<T, kScales, kNormed, 3, 3, 2>(p, norm, adds, blocks, kThirdOfAnSm, stream)
            : launch_linear<T, kScales, kNormed, 2, 2, 3>(p, norm, adds, blocks, 0, stream);
    } else {
        few ? launch_linear<T, kScales, kNormed, 6, 6, 2>(p, norm, adds, blocks, 0, stream)
            : launch_linear<T, kScales, kNormed, 4, 4, 3>(p, norm, adds, blocks, 0, stream);
    }
}

}  // namespace
}  // namespace fastkernels
