// What the norms share: one kernel over rows, told by NormKind what a row's sums are.
//
//   x, residual  [num_tokens, num_heads, size] bf16 | fp16 | fp32     weight, bias  [size]
//   out          like x; e4m3 or int8 with scales of the *_quant ops (common/byte_scales.h)
//
// blockDim.x threads own one row: a block a long row, and for rows of at most 32 threads several rows a block
// (blockDim.y). A thread owns kPieces pieces of kVec elements (16 bytes, or one element where the addresses are odd),
// all loaded, with their weights, before the first use and kept in registers; pieces beyond are read again. Sums cost
// one barrier. Before pdl_wait() block 0 brings the weight to L2. The shape of a block follows from size alone, so a
// row's result does not depend on its batch. Bytes: (2, with a residual 4) * size * sizeof(T) a row; the weight stays
// in L1 and L2.
#pragma once

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "common/reduce.cuh"
#include "fastkernels/norm.h"

namespace fastkernels {

enum class NormKind { rms, add_rms, layer };

inline constexpr int kNormMaxThreads = 512;
inline constexpr int kNormPieces = 4;

// reduce(x, y) over the blockDim.x threads of a row, a power of two up to 32 or a multiple of 32. Every scratch of a
// kernel serves one call.
template <typename Op>
__device__ __forceinline__ float row_reduce(float x, float* scratch, Op op) {
    if (blockDim.x <= 32) {
        for (int offset = blockDim.x / 2; offset > 0; offset /= 2) {
            x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
        }
        return x;
    }
    x = warp_reduce(x, op);
    const int num_warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = scratch[0];
#pragma unroll 4
    for (int warp = 1; warp < num_warps; ++warp) {
        x = op(x, scratch[warp]);
    }
    return x;
}

__device__ __forceinline__ float add(float a, float b) {
    return a + b;
}

template <NormKind kKind, typename T, typename Out, int kVec, int kPieces>
__global__ void __launch_bounds__(kNormMaxThreads, 1) row_norm_kernel(const NormParams p) {
    using Piece = Vec<T, kVec>;
    constexpr bool kQuantized = sizeof(Out) == 1;
    __shared__ float scratch[2][kNormMaxThreads / 32];
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    const unsigned num_heads = static_cast<unsigned>(p.num_heads);
    const unsigned token = num_heads == 1 ? row : row / num_heads, head = row - token * num_heads;
    // The rows past the end of the last block have no pieces, but take part in the sums of their warp.
    const int num_pieces = token < p.num_tokens ? static_cast<int>(p.size / kVec) : 0;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    T* residual = static_cast<T*>(p.residual) + token * p.residual_token_stride + head * p.residual_head_stride;
    Out* out = static_cast<Out*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const T* weight = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);

    if (blockIdx.x == 0) {
        constexpr int kLine = 128 / sizeof(T);
        for (int i = (threadIdx.y * blockDim.x + threadIdx.x) * kLine; i < p.size;
             i += blockDim.x * blockDim.y * kLine) {
            prefetch_l2(weight + i);
            if (kKind == NormKind::layer && bias != nullptr) {
                prefetch_l2(bias + i);
            }
        }
    }
    pdl_launch_dependents();
    pdl_wait();

    // f(piece, j) of the pieces kept, f(piece) of those beyond.
    const auto for_kept = [&](auto f) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            const int piece = threadIdx.x + j * blockDim.x;
            if (piece < num_pieces) {
                f(piece, j);
            }
        }
    };
    const auto for_rest = [&](auto f) {
        for (int piece = threadIdx.x + kPieces * blockDim.x; piece < num_pieces; piece += blockDim.x) {
            f(piece);
        }
    };

    // What is normalised: the row of x, or the residual with it added.
    Piece kept[kPieces], weights[kPieces], biases[kKind == NormKind::layer ? kPieces : 1];
    for_kept([&](int piece, int j) { kept[j] = load_once<kVec>(x + piece * kVec); });
    const auto added = [&](const Piece& v, const Piece& r, int piece) {
        float a[kVec], b[kVec];
        to_floats(v, a);
        to_floats(r, b);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            a[i] += b[i];
        }
        const Piece sum = from_floats<T>(a);
        store_vec(residual + piece * kVec, sum);
        return sum;
    };
    if constexpr (kKind == NormKind::add_rms) {
        Piece residuals[kPieces];
        for_kept([&](int piece, int j) { residuals[j] = load_vec<kVec>(residual + piece * kVec); });
        for_kept([&](int piece, int j) { weights[j] = load_vec<kVec>(weight + piece * kVec); });
        for_kept([&](int piece, int j) { kept[j] = added(kept[j], residuals[j], piece); });
    } else {
        for_kept([&](int piece, int j) { weights[j] = load_vec<kVec>(weight + piece * kVec); });
        if (kKind == NormKind::layer && bias != nullptr) {
            for_kept([&](int piece, int j) { biases[j] = load_vec<kVec>(bias + piece * kVec); });
        }
    }
    const auto first_load = [&](int piece) {
        const Piece v = load_vec<kVec>(x + piece * kVec);
        return kKind == NormKind::add_rms ? added(v, load_vec<kVec>(residual + piece * kVec), piece) : v;
    };
    const auto load = [&](int piece) {
        return load_vec<kVec>((kKind == NormKind::add_rms ? residual : x) + piece * kVec);
    };

    // Sums. The variance of layer_norm takes a pass of its own: mean(x^2) - mean(x)^2 would cancel.
    const float count = static_cast<float>(p.size);
    float mean = 0.0f, sum = 0.0f, largest = 0.0f;
    if constexpr (kKind == NormKind::layer) {
        const auto add_up = [&](const Piece& v) {
            float a[kVec];
            to_floats(v, a);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                mean += a[i];
            }
        };
        for_kept([&](int, int j) { add_up(kept[j]); });
        for_rest([&](int piece) { add_up(load(piece)); });
        mean = row_reduce(mean, scratch[1], add) / count;
    }
    if constexpr (kKind == NormKind::layer) {
        for_kept([&](int, int j) { forget(kept[j]); });
    }
    const auto add_squares = [&](const Piece& v, const Piece& w) {
        float a[kVec], b[kVec];
        to_floats(v, a);
        to_floats(w, b);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            a[i] -= kKind == NormKind::layer ? mean : 0.0f;
            sum = fmaf(a[i], a[i], sum);
            if constexpr (kQuantized) {
                largest = fmaxf(largest, fabsf(a[i] * b[i]));
            }
        }
    };
    for_kept([&](int, int j) { add_squares(kept[j], weights[j]); });
    if constexpr (kQuantized) {
        for_kept([&](int, int j) { forget(weights[j]); });
    }
    for_rest([&](int piece) {
        add_squares(kKind == NormKind::layer ? load(piece) : first_load(piece), load_vec<kVec>(weight + piece * kVec));
    });
    float inverse_scale = 0.0f;
    if constexpr (kQuantized) {
        if (p.bytes.kind == ScaleKind::token) {
            largest = warp_reduce(largest, fmaxf);
            if (blockDim.x > 32 && threadIdx.x % 32 == 0) {
                scratch[1][threadIdx.x / 32] = largest;  // row_reduce's barrier is before it is read
            }
        } else if (p.bytes.kind == ScaleKind::tensor) {
            inverse_scale = 1.0f / *p.bytes.scales;
        }
    }
    const float scale = rsqrtf(row_reduce(sum, scratch[0], add) / count + p.eps);
    if constexpr (kQuantized) {
        if (p.bytes.kind == ScaleKind::token) {
            for (int warp = 0; warp < blockDim.x / 32 && blockDim.x > 32; ++warp) {
                largest = fmaxf(largest, scratch[1][warp]);
            }
            const float byte_scale = fmaxf(largest * scale / kLargestByte<Out>, kLeastScale);
            inverse_scale = 1.0f / byte_scale;
            if (threadIdx.x == 0 && num_pieces > 0) {
                p.bytes.scales[row] = byte_scale;
            }
        }
    }

    // Write. Without this the row would be kept as fp32 too: twice the registers, half the rows in flight.
    for_kept([&](int, int j) { forget(kept[j]); });
    const auto write = [&](int piece, const Piece& v, const Piece& w, const Piece& b) {
        float a[kVec], c[kVec], d[kVec];
        to_floats(v, a);
        to_floats(w, c);
        if (kKind == NormKind::layer && bias != nullptr) {
            to_floats(b, d);
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            a[i] = (a[i] - (kKind == NormKind::layer ? mean : 0.0f)) * scale * c[i];
            a[i] = kKind == NormKind::layer && bias != nullptr ? a[i] + d[i] : a[i];
        }
        if constexpr (kQuantized) {
            if (p.bytes.kind == ScaleKind::block) {
                // A block is the pieces of kScaleBlock / kVec neighbouring lanes.
                constexpr int kLanes = kScaleBlock / kVec;
                float most = 0.0f;
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    most = fmaxf(most, fabsf(a[i]));
                }
                const unsigned lanes = kLanes == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16);
#pragma unroll
                for (int offset = kLanes / 2; offset > 0; offset /= 2) {
                    most = fmaxf(most, __shfl_xor_sync(lanes, most, offset));
                }
                const float byte_scale = fmaxf(most / kLargestByte<Out>, kLeastScale);
                inverse_scale = 1.0f / byte_scale;
                if (piece % kLanes == 0) {
                    p.bytes.scales[row * (p.size / kScaleBlock) + piece / kLanes] = byte_scale;
                }
            }
            store_quantized(out + piece * kVec, a, inverse_scale);
        } else {
            store_vec(out + piece * kVec, from_floats<T>(a));
        }
    };
    for_kept([&](int piece, int j) { write(piece, kept[j], weights[j], biases[kKind == NormKind::layer ? j : 0]); });
    for_rest([&](int piece) {
        Piece b;
        if (kKind == NormKind::layer && bias != nullptr) {
            b = load_vec<kVec>(bias + piece * kVec);
        }
        write(piece, load(piece), load_vec<kVec>(weight + piece * kVec), b);
    });
}

template <NormKind kKind, typename T, typename Out, int kVec>
void launch_rows(const NormParams& p, void* stream) {
    // A short row takes a power of two of threads, so that a sum stays inside its part of a warp, and shares a block of
    // 128 with others; a quantised one takes a warp.
    const int64_t pieces = p.size / kVec, rows = p.num_tokens * p.num_heads;
    const bool one_piece = pieces <= 32;
    unsigned threads = 32;
    if (one_piece) {
        while (sizeof(Out) > 1 && threads / 2 >= pieces) {
            threads /= 2;
        }
    } else {
        const int64_t wanted = (pieces + 32 * kNormPieces - 1) / (32 * kNormPieces) * 32;
        threads = static_cast<unsigned>(wanted < kNormMaxThreads ? wanted : kNormMaxThreads);
    }
    const unsigned rows_per_block = threads <= 32 ? 128 / threads : 1;
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block)),
                              .block = dim3(threads, rows_per_block),
                              .pdl = true};
    if (one_piece) {
        launch(row_norm_kernel<kKind, T, Out, kVec, 1>, config, stream, p);
    } else {
        launch(row_norm_kernel<kKind, T, Out, kVec, kNormPieces>, config, stream, p);
    }
}

// Whether 16-byte pieces fit every address and stride of p.
inline bool has_wide_pieces(const NormParams& p, int64_t elements, int64_t out_elements) {
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) |
                         reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.bias) |
                         reinterpret_cast<uintptr_t>(p.out);
    const auto strides = p.x_token_stride | p.x_head_stride | p.residual_token_stride | p.residual_head_stride | p.size;
    return address % 16 == 0 && strides % elements == 0 && (p.out_token_stride | p.out_head_stride) % out_elements == 0;
}

inline bool has_rows(const char* op, const NormParams& p) {
    check(p.num_tokens * p.num_heads < (int64_t{1} << 31) && p.size < (int64_t{1} << 31), op, ": x has ", p.num_tokens,
          " x ", p.num_heads, " rows of ", p.size, ", but the op takes fewer than 2^31 rows and elements a row");
    return p.num_tokens * p.num_heads != 0 && p.size != 0;
}

template <NormKind kKind>
void launch_row_norm(const char* op, const NormParams& p, void* stream) {
    if (!has_rows(op, p)) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        constexpr int kWide = kVecElements<T>;
        if (has_wide_pieces(p, kWide, kWide)) {
            launch_rows<kKind, T, T, kWide>(p, stream);
        } else {
            launch_rows<kKind, T, T, 1>(p, stream);
        }
    });
}

template <NormKind kKind>
void launch_row_norm_quant(const char* op, const NormParams& p, void* stream) {
    if (!has_rows(op, p)) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        constexpr int kWide = kVecElements<T>;
        check(has_wide_pieces(p, kWide, 16), op,
              ": on CUDA the op takes addresses, rows and strides of whole 16 bytes");
        if (p.bytes.type == ByteType::e4m3) {
            launch_rows<kKind, T, __nv_fp8_e4m3, kWide>(p, stream);
        } else {
            launch_rows<kKind, T, int8_t, kWide>(p, stream);
        }
    });
}

}  // namespace fastkernels
