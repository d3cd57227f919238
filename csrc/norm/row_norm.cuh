// What the norms share: one kernel over rows, told by NormKind what a row's sums are.
//
//   x, residual  [num_tokens, num_heads, size] bf16 | fp16 | fp32     weight, bias  [size]
//   out          like x; e4m3 or int8 with scales of the *_quant ops (common/byte_scales.h)
//
// A block of kThreads owns one row, or, where a row has at most 32 pieces (kThreads 0), blockDim.x threads own one of
// the block's blockDim.y. A thread owns kPieces pieces of kVec elements (16 bytes, or one element where the addresses
// are odd), all loaded, with their weights, before the first use. Kept in registers are, as floats, the products x w,
// of layer_norm x; pieces beyond, which rows past kNormMaxThreads * kNormPieces have, are read again. Where a row is
// exactly as long as its block's pieces (kFull), counts are constants and nothing is asked of a piece; else pieces past
// the end are zeros. Sums cost one barrier. The largest |x w| is found before it, and scaled after; for the scales of
// blocks of kScaleBlock each lane answers for one of its pieces. Before pdl_wait() block 0 brings the weight to L2. The
// shape of a block follows from size alone, so a row's result does not depend on its batch. Bytes: (2, with a residual
// 4) * size * sizeof(T) a row, with bytes as the result one less for each element; the weight stays in L1 and L2.
#pragma once

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "common/ptx/rcp.cuh"
#include "common/reduce.cuh"
#include "fastkernels/norm.h"

namespace fastkernels {

enum class NormKind { rms, add_rms, layer };

inline constexpr float kLargestFloat = 0x1.fffffep127f;
inline constexpr int kNormMaxThreads = 512;
inline constexpr int kNormPieces = 4;
inline constexpr int kNormShortThreads = 128;  // of the block where several rows share it

// Threads of an SM that the registers are to leave room for, where a row is so short that its block is small.
template <NormKind kKind, typename Out, int kThreads, bool kFull>
inline constexpr int kNormThreadsPerSm = kKind == NormKind::add_rms ? (kFull ? 896 : 640)
                                         : kKind == NormKind::rms   ? (sizeof(Out) == 1 ? 1152 : 1024)
                                         : kFull && kThreads <= 128 ? 768
                                                                    : 640;

template <NormKind kKind, typename Out, int kThreads, bool kFull>
inline constexpr int kNormMinBlocks =
    kThreads == 0 || kThreads == kNormMaxThreads ? 1 : kNormThreadsPerSm<kKind, Out, kThreads, kFull> / kThreads;

__device__ __forceinline__ float add(float a, float b) {
    return a + b;
}

// reduce(x, y) over the lanes of a row in a warp: 32, or the blockDim.x of a short row, a power of two.
template <int kThreads, typename Op>
__device__ __forceinline__ float lanes_reduce(float x, Op op) {
    if constexpr (kThreads > 0) {
        return warp_reduce(x, op);
    } else {
        for (int offset = blockDim.x / 2; offset > 0; offset /= 2) {
            x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
        }
        return x;
    }
}

// How many of a row's pieces the threads of a warp own.
template <int kThreads>
__device__ __forceinline__ int pieces_of_warp(int warp, int num_pieces) {
    if constexpr (kThreads == 0) {
        return num_pieces;
    } else {
        const int rounds = num_pieces / kThreads;
        return 32 * rounds + min(max(num_pieces - rounds * kThreads - 32 * warp, 0), 32);
    }
}

// kFull: a row has kThreads * kNormPieces pieces exactly.
template <NormKind kKind, typename T, typename Out, int kVec, int kThreads, bool kFull>
__global__ void __launch_bounds__(kThreads > 0 ? kThreads : kNormShortThreads,
                                  (kNormMinBlocks<kKind, Out, kThreads, kFull>)) row_norm_kernel(const NormParams p) {
    using Piece = Vec<T, kVec>;
    constexpr bool kQuantized = sizeof(Out) == 1, kLayer = kKind == NormKind::layer;
    constexpr int kPieces = kThreads > 0 ? kNormPieces : 1, kWarps = kThreads > 32 ? kThreads / 32 : 1;
    constexpr bool kHasRest = kThreads == kNormMaxThreads && !kFull;
    __shared__ float scratch[2][kWarps];  // the warps' sums; their means, or largest elements
    const int threads = kThreads > 0 ? kThreads : static_cast<int>(blockDim.x), first = threadIdx.x;
    const unsigned row = kThreads > 0 ? blockIdx.x : blockIdx.x * blockDim.y + threadIdx.y;
    const unsigned num_heads = static_cast<unsigned>(p.num_heads);
    const unsigned token = num_heads == 1 ? row : row / num_heads, head = row - token * num_heads;
    const int size = kFull ? kThreads * kPieces * kVec : static_cast<int>(p.size);
    // The rows past the end of the last block have no pieces, but take part in the sums of their warp.
    const int num_pieces = kFull || token < p.num_tokens ? size / kVec : 0;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    T* residual = static_cast<T*>(p.residual) + token * p.residual_token_stride + head * p.residual_head_stride;
    Out* out = static_cast<Out*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const T* weight = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);

    if (blockIdx.x == 0) {
        constexpr int kLine = 128 / sizeof(T);
        for (int i = (threadIdx.y * threads + first) * kLine; i < size; i += threads * blockDim.y * kLine) {
            prefetch_l2(weight + i);
            if (kLayer && bias != nullptr) {
                prefetch_l2(bias + i);
            }
        }
    }
    pdl_launch_dependents();
    pdl_wait();

    const auto piece_of = [&](int j) { return first + j * threads; };
    const auto exists = [&](int j) { return kFull || piece_of(j) < num_pieces; };
    // A piece, or zeros: as one unit, since by elements the compiler would choose each.
    const auto load = [&](const T* from, int piece, bool is_there) {
        using Unit = Vec<uint32_t, sizeof(Piece) / 4>;
        if constexpr (kVec > 1) {
            Unit unit{};
            if (is_there) {
                unit = *reinterpret_cast<const Unit*>(from + piece * kVec);
            }
            return *reinterpret_cast<const Piece*>(&unit);
        } else {
            return is_there ? load_vec<kVec>(from + piece) : Piece{};
        }
    };
    const auto load_kept = [&](const T* from, Piece(&pieces)[kPieces]) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            pieces[j] = load(from, piece_of(j), exists(j));
        }
    };
    // f(piece, whether there is one) of the pieces beyond those kept; all lanes of a warp call it together.
    const auto for_rest = [&](auto f) {
        if constexpr (kHasRest) {
            for (int piece = piece_of(kPieces); piece - first % 32 < num_pieces; piece += threads) {
                f(piece, piece < num_pieces);
            }
        }
    };
    const auto added = [&](const Piece& v, const Piece& r) {
        float a[kVec], b[kVec];
        to_floats(v, a);
        to_floats(r, b);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            a[i] += b[i];
        }
        return from_floats<T>(a);
    };

    // What is normalised: the row of x, or the residual with it added.
    Piece row_pieces[kPieces], weights[kPieces], biases[kLayer ? kPieces : 1];
    load_kept(x, row_pieces);
    float given_scale = 1.0f;
    if (kQuantized && p.bytes.kind == ScaleKind::tensor) {
        given_scale = *p.bytes.scales;
    }
    if constexpr (kKind == NormKind::add_rms) {
        Piece residuals[kPieces];
        load_kept(residual, residuals);
        load_kept(weight, weights);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            row_pieces[j] = added(row_pieces[j], residuals[j]);
            if (exists(j)) {
                store_vec(residual + piece_of(j) * kVec, row_pieces[j]);
            }
        }
    } else {
        load_kept(weight, weights);
        if constexpr (kLayer) {
            if (bias != nullptr) {
                load_kept(bias, biases);
            } else {
#pragma unroll
                for (auto& piece : biases) {
                    piece = Piece{};
                }
            }
        }
    }

    // Sums. What is kept of the row, as floats: with the weight multiplied, or of layer_norm without. Its squares are
    // taken about the mean of the warp's part: mean(x^2) - mean(x)^2 would cancel.
    float kept[kPieces][kVec], mean = 0.0f, sum = 0.0f, largest = 0.0f, block_largest = 0.0f;
    const auto add_squares = [&](const Piece& v, const Piece& w, float (&y)[kVec]) {
        float a[kVec];
        to_floats(v, a);
        to_floats(w, y);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            sum = fmaf(a[i], a[i], sum);
            y[i] *= a[i];
        }
    };
    if constexpr (kLayer) {
        const auto add_up = [&](const float (&a)[kVec]) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                mean += a[i];
            }
        };
        const auto add_squares_about_mean = [&](const float (&a)[kVec]) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum = fmaf(a[i] - mean, a[i] - mean, sum);
            }
        };
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            to_floats(row_pieces[j], kept[j]);
            add_up(kept[j]);
        }
        for_rest([&](int piece, bool is_there) {
            float a[kVec];
            to_floats(load(x, piece, is_there), a);
            add_up(a);
        });
        const int own = kFull ? 32 * kPieces : pieces_of_warp<kThreads>(first / 32, num_pieces);
        mean = lanes_reduce<kThreads>(mean, add) / static_cast<float>(kVec * max(1, own));
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            if (exists(j)) {
                add_squares_about_mean(kept[j]);
            }
        }
        for_rest([&](int piece, bool is_there) {
            if (is_there) {
                float a[kVec];
                to_floats(load_vec<kVec>(x + piece * kVec), a);
                add_squares_about_mean(a);
            }
        });
    } else {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            add_squares(row_pieces[j], weights[j], kept[j]);
        }
        for_rest([&](int piece, bool is_there) {
            Piece v = load(x, piece, is_there);
            if constexpr (kKind == NormKind::add_rms) {
                v = added(v, load(residual, piece, is_there));
                if (is_there) {
                    store_vec(residual + piece * kVec, v);
                }
            }
            float y[kVec];
            add_squares(v, load(weight, piece, is_there), y);
            largest = fmaxf(largest, largest_of(y));
        });
    }

    // The largest |x w|, of which scales are made: of the row, or of the block of one of the lane's pieces.
    sum = lanes_reduce<kThreads>(sum, add);
    constexpr int kLanes = kScaleBlock / kVec;
    if constexpr (kQuantized) {
        float largest_of_piece[kPieces];
        if (p.bytes.kind != ScaleKind::tensor) {
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                largest_of_piece[j] = largest_of(kept[j]);
                largest = fmaxf(largest, largest_of_piece[j]);
            }
        }
        if (p.bytes.kind == ScaleKind::token) {
            largest = lanes_reduce<kThreads>(largest, fmaxf);
        } else if (p.bytes.kind == ScaleKind::block) {
            block_largest = largest_of_block<kLanes>(largest_of_piece);
        }
    }
    if constexpr (kWarps > 1) {
        if (first % 32 == 0) {
            scratch[0][first / 32] = sum;
            scratch[1][first / 32] = kLayer ? mean : largest;
        }
        __syncthreads();
        sum = 0.0f;
        if constexpr (kLayer) {  // from the warps' means and squares about them to the row's
            const auto pieces_of = [&](int warp) {
                return kFull ? 32 * kPieces : pieces_of_warp<kThreads>(warp, num_pieces);
            };
            float total = 0.0f;
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) {
                total = fmaf(static_cast<float>(pieces_of(warp)), scratch[1][warp], total);
            }
            mean = total / static_cast<float>(num_pieces);
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) {
                const float apart = scratch[1][warp] - mean;
                sum += fmaf(static_cast<float>(kVec * pieces_of(warp)), apart * apart, scratch[0][warp]);
            }
        } else {
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) {
                sum += scratch[0][warp];
                largest = fmaxf(largest, scratch[1][warp]);
            }
        }
    }
    const float scale = rsqrtf(sum / static_cast<float>(size) + p.eps);

    // What is kept times `factor` is the output: the norm's scale, times the inverse of that of the bytes. A finite
    // one, since zeros, whose bytes have the least scale, are to stay zeros.
    const auto factor_of = [&](float inverse_of_byte_scale) {
        const float product = scale * inverse_of_byte_scale;
        return product > kLargestFloat ? kLargestFloat : product;
    };
    float factor = scale;
    const auto factor_of_block = [&](float largest_of_it, int piece, bool writes) {
        const float byte_scale = byte_scale_of<Out>(largest_of_it * scale);
        if (writes) {
            p.bytes.scales[int64_t{row} * (size / kScaleBlock) + piece / kLanes] = byte_scale;
        }
        return factor_of(rcp_rounded(byte_scale));
    };
    float own_factor = 0.0f;
    if constexpr (kQuantized) {
        if (p.bytes.kind == ScaleKind::token) {
            const float byte_scale = byte_scale_of<Out>(largest * scale);
            factor = factor_of(rcp_rounded(byte_scale));
            if (first == 0 && num_pieces > 0) {
                p.bytes.scales[row] = byte_scale;
            }
        } else if (p.bytes.kind == ScaleKind::tensor) {
            factor = factor_of(1.0f / given_scale);
        } else {
            const int own = first % kPieces;
            own_factor = factor_of_block(block_largest, piece_of(own), first % kLanes < kPieces && exists(own));
        }
    }
    const auto write = [&](int piece, float (&y)[kVec], const Piece& w, const Piece& b) {
        if constexpr (kQuantized) {
            store_quantized(out + piece * kVec, y, factor);
        } else {
            float c[kVec], d[kVec];
            if constexpr (kLayer) {
                to_floats(w, c);
                to_floats(b, d);
            }
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                y[i] = kLayer ? fmaf((y[i] - mean) * scale, c[i], d[i]) : y[i] * scale;
            }
            store_vec(out + piece * kVec, from_floats<T>(y));
        }
    };
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if constexpr (kQuantized) {
            if (p.bytes.kind == ScaleKind::block) {
                factor = __shfl_sync(0xffffffffu, own_factor, j, kPieces);
            }
        }
        if (exists(j)) {
            write(piece_of(j), kept[j], weights[j], biases[kLayer ? j : 0]);
        }
    }
    for_rest([&](int piece, bool is_there) {
        const Piece v = load(kKind == NormKind::add_rms ? residual : x, piece, is_there);
        const Piece w = load(weight, piece, is_there);
        Piece b{};
        if (kLayer && bias != nullptr) {
            b = load(bias, piece, is_there);
        }
        float y[kVec], c[kVec];
        to_floats(v, y);
        to_floats(w, c);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            y[i] *= kLayer ? 1.0f : c[i];
        }
        if constexpr (kQuantized) {
            if (p.bytes.kind == ScaleKind::block) {
                float largest_of_piece[1] = {largest_of(y)};
                factor =
                    factor_of_block(largest_of_block<kLanes>(largest_of_piece), piece, is_there && piece % kLanes == 0);
            }
        }
        if (is_there) {
            write(piece, y, w, b);
        }
    });
}

template <NormKind kKind, typename T, typename Out, int kVec>
void launch_rows(const NormParams& p, void* stream) {
    const int64_t pieces = p.size / kVec, rows = p.num_tokens * p.num_heads;
    if (pieces <= 32) {
        // A power of two of threads, so that a sum stays inside its part of a warp; a quantised row takes a warp.
        unsigned threads = 32;
        while (sizeof(Out) > 1 && threads / 2 >= pieces) {
            threads /= 2;
        }
        const unsigned rows_per_block = kNormShortThreads / threads;
        launch(row_norm_kernel<kKind, T, Out, kVec, 0, false>,
               {.grid = dim3(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block)),
                .block = dim3(threads, rows_per_block),
                .pdl = true},
               stream, p);
        return;
    }
    const auto run = [&]<int kThreads>() {
        const LaunchConfig config{.grid = dim3(static_cast<unsigned>(rows)), .block = dim3(kThreads), .pdl = true};
        if (kVec > 1 && pieces == kThreads * kNormPieces) {
            launch(row_norm_kernel<kKind, T, Out, kVec, kThreads, kVec != 1>, config, stream, p);
        } else {
            launch(row_norm_kernel<kKind, T, Out, kVec, kThreads, false>, config, stream, p);
        }
    };
    if (kVec > 1 && pieces <= 64 * kNormPieces) {
        run.template operator()<64>();
    } else if (kVec > 1 && pieces <= 128 * kNormPieces) {
        run.template operator()<128>();
    } else if (kVec > 1 && pieces <= 256 * kNormPieces) {
        run.template operator()<256>();
    } else {
        run.template operator()<kNormMaxThreads>();
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
