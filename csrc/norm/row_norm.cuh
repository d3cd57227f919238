// What the norms share: one kernel over rows, told by NormKind what a row's sums are.
//
//   x, residual, out  [num_tokens, num_heads, size]   weight, bias  [size]   bf16 | fp16 | fp32
//
// blockDim.x threads own one row: a block a long row, and for rows of up to 32 threads several rows a block
// (blockDim.y). A thread owns pieces of kVec elements (16 bytes, or one element where the addresses are odd), kept in
// registers between the passes for up to kKeptPieces pieces a thread, read again (from L2) beyond. Before pdl_wait()
// the weight is brought to L2. Bytes: (2, with a residual 4) * size * sizeof(T) a row; the weight stays in L2.
#pragma once

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "fastkernels/norm.h"

namespace fastkernels {

enum class NormKind { rms, add_rms, layer };

inline constexpr int kNormMaxThreads = 1024;
inline constexpr int kKeptPieces = 2;

// The sum over the blockDim.x threads of a row, a power of two up to 32 or a multiple of 32.
__device__ __forceinline__ float row_sum(float x, float* scratch) {
    if (blockDim.x > 32) {
        return block_sum(x, scratch);
    }
    for (int offset = blockDim.x / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

template <NormKind kKind, typename T, int kVec>
__global__ void __launch_bounds__(kNormMaxThreads, 1) row_norm_kernel(const NormParams p) {
    using Piece = Vec<T, kVec>;
    __shared__ float scratch[kNormMaxThreads / 32];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    // The rows past the end of the last block have no pieces, but take part in the sums of their warp.
    const int64_t num_pieces = token < p.num_tokens ? p.size / kVec : 0;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    T* residual = static_cast<T*>(p.residual) + token * p.residual_token_stride + head * p.residual_head_stride;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const T* weight = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);

    for (int64_t piece = threadIdx.x; piece < num_pieces; piece += blockDim.x) {
        prefetch_l2(weight + piece * kVec);
        if (kKind == NormKind::layer && bias != nullptr) {
            prefetch_l2(bias + piece * kVec);
        }
    }
    pdl_wait();

    // visit(piece, row's values): the kept pieces from registers, the others through load.
    Piece kept[kKeptPieces];
    const auto for_each_piece = [&](auto load_kept, auto load, auto visit) {
#pragma unroll
        for (int j = 0; j < kKeptPieces; ++j) {
            const int64_t piece = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
            if (piece < num_pieces) {
                load_kept(piece, kept[j]);
                visit(piece, kept[j]);
            }
        }
        for (int64_t piece = threadIdx.x + static_cast<int64_t>(kKeptPieces) * blockDim.x; piece < num_pieces;
             piece += blockDim.x) {
            visit(piece, load(piece));
        }
    };
    // What is normalised: the row of x, or, once the first pass has written it, of the residual.
    const auto first_load = [&](int64_t piece) {
        Piece v = load_vec<kVec>(x + piece * kVec);
        if constexpr (kKind == NormKind::add_rms) {
            const Piece r = load_vec<kVec>(residual + piece * kVec);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                v[i] = from_float<T>(to_float(v[i]) + to_float(r[i]));
            }
            store_vec(residual + piece * kVec, v);
        }
        return v;
    };
    const auto first_load_kept = [&](int64_t piece, Piece& v) { v = first_load(piece); };
    const auto load = [&](int64_t piece) {
        return load_vec<kVec>((kKind == NormKind::add_rms ? residual : x) + piece * kVec);
    };
    const auto have = [](int64_t, Piece&) {};

    // Sums. The variance of layer_norm takes a pass of its own: mean(x^2) - mean(x)^2 would cancel.
    const float count = static_cast<float>(p.size);
    float mean = 0.0f, sum = 0.0f;
    if constexpr (kKind == NormKind::layer) {
        for_each_piece(first_load_kept, load, [&](int64_t, const Piece& v) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                mean += to_float(v[i]);
            }
        });
        mean = row_sum(mean, scratch) / count;
        for_each_piece(have, load, [&](int64_t, const Piece& v) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum += (to_float(v[i]) - mean) * (to_float(v[i]) - mean);
            }
        });
    } else {
        for_each_piece(first_load_kept, first_load, [&](int64_t, const Piece& v) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum += to_float(v[i]) * to_float(v[i]);
            }
        });
    }
    const float scale = rsqrtf(row_sum(sum, scratch) / count + p.eps);
    pdl_launch_dependents();

    // Write.
    for_each_piece(have, load, [&](int64_t piece, const Piece& v) {
        const Piece w = load_vec<kVec>(weight + piece * kVec);
        Piece y;
        if (kKind == NormKind::layer && bias != nullptr) {
            const Piece b = load_vec<kVec>(bias + piece * kVec);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                y[i] = from_float<T>((to_float(v[i]) - mean) * scale * to_float(w[i]) + to_float(b[i]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                y[i] = from_float<T>((to_float(v[i]) - mean) * scale * to_float(w[i]));
            }
        }
        store_vec(out + piece * kVec, y);
    });
}

template <NormKind kKind>
void launch_row_norm(const NormParams& p, void* stream) {
    const int64_t rows = p.num_tokens * p.num_heads;
    if (rows == 0 || p.size == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kVec>() {
            // kKeptPieces pieces a thread hide latency. A short row takes a power of two of threads, so that a sum
            // stays inside its part of a warp, and shares a block of 128 with others.
            const int64_t wanted = (p.size / kVec + kKeptPieces - 1) / kKeptPieces;
            unsigned threads = 1, rows_per_block = 1;
            if (wanted <= 32) {
                while (threads < wanted) {
                    threads *= 2;
                }
                rows_per_block = 128 / threads;
            } else {
                threads = wanted > kNormMaxThreads ? kNormMaxThreads : static_cast<unsigned>((wanted + 31) / 32 * 32);
            }
            const auto blocks = static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
            launch(row_norm_kernel<kKind, T, kVec>,
                   {.grid = dim3(blocks), .block = dim3(threads, rows_per_block), .pdl = true}, stream, p);
        };
        constexpr int kWide = kVecElements<T>;
        const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) |
                             reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.bias) |
                             reinterpret_cast<uintptr_t>(p.out);
        const auto strides = p.x_token_stride | p.x_head_stride | p.residual_token_stride | p.residual_head_stride |
                             p.out_token_stride | p.out_head_stride | p.size;
        if (address % 16 == 0 && strides % kWide == 0) {
            run.template operator()<kWide>();
        } else {
            run.template operator()<1>();
        }
    });
}

}  // namespace fastkernels
