// Rows of floats, wherever they come from, to bytes with scales.
//
//   out  [num_tokens, size] e4m3 | int8 | e5m2     scales  as byte_scales.h says, row-major
//
// A Source makes the floats: source.read(token, at) loads the Raw of kVecElements<T> of them from column `at` on,
// source.compute(raw, x) makes them. One scale for all, or one for each kScaleBlock: a thread owns kPieces pieces of a
// row, and the lanes of a block of it share their maximum. A scale a token: a block of threads owns a row and keeps
// kPieces pieces a thread, as floats where they cost more than a conversion; those beyond are made twice. Few long rows
// go to clusters (quantize_row_cluster.cuh).
// A thread whose piece is past the end reads the last one instead, so that all but stores is one run of instructions.
#pragma once

#include <algorithm>

#include "common/byte_scales.h"
#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/ptx/rcp.cuh"
#include "common/quantize_row_cluster.cuh"
#include "common/reduce.cuh"

namespace fastkernels {

struct ByteRows {
    void* out;
    int64_t token_stride;
    int64_t num_tokens, size;
    ByteScales bytes;
};

inline constexpr int kQuantizePieceThreads = 256, kQuantizePairThreads = 128;  // with one piece a thread, with two
inline constexpr int kQuantizeManyPieces = 8192;                               // of an SM
inline constexpr int kQuantizeShortRow = 128 * 4;                              // pieces of four a thread

template <typename T, typename Byte, typename Source, int kThreads, int kPieces>
__global__ void __launch_bounds__(kThreads)
    quantize_pieces_kernel(const Source source, const ByteRows rows, unsigned blocks_per_token) {
    constexpr int kVec = kVecElements<T>, kLanes = kScaleBlock / kVec;
    const unsigned token = blockIdx.x / blocks_per_token, block = blockIdx.x - token * blocks_per_token;
    const int size = static_cast<int>(rows.size), step = blockDim.x * kVec;
    const int first = static_cast<int>(block * blockDim.x * kPieces + threadIdx.x) * kVec;
    pdl_launch_dependents();
    pdl_wait();
    typename Source::Raw raw[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        raw[j] = source.read(token, min(first + j * step, size - kVec));
    }
    float x[kPieces][kVec], largest[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        source.compute(raw[j], x[j]);
    }
    // The inverse of the scale, of all elements or of a block in piece threadIdx.x % kPieces.
    float inverse_scale;
    if (rows.bytes.kind == ScaleKind::block) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            largest[j] = largest_of(x[j]);
        }
        const float scale = byte_scale_of<Byte>(largest_of_block<kLanes>(largest));
        const int at = first + static_cast<int>(threadIdx.x % kPieces) * step;
        if (at < size && threadIdx.x % kLanes < kPieces) {
            rows.bytes.scales[token * (size / kScaleBlock) + at / kScaleBlock] = scale;
        }
        inverse_scale = rcp_rounded(scale);
    } else {
        inverse_scale = 1.0f / *rows.bytes.scales;
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        const int at = first + j * step;
        const float inverse = __shfl_sync(0xffffffffu, inverse_scale, j, kPieces);
        if (at < size) {
            store_quantized(static_cast<Byte*>(rows.out) + token * rows.token_stride + at, x[j], inverse);
        }
    }
}

template <typename T, typename Byte, typename Source, int kThreads, int kPieces, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks) quantize_rows_kernel(const Source source, const ByteRows rows) {
    constexpr int kVec = kVecElements<T>;
    __shared__ float scratch[kThreads / 32];
    const int size = static_cast<int>(rows.size), step = blockDim.x * kVec, first = threadIdx.x * kVec;
    pdl_launch_dependents();
    pdl_wait();
    typename Source::Raw raw[kPieces];
    float kept[Source::kKeepsFloats ? kPieces : 1][kVec], largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        raw[j] = source.read(blockIdx.x, min(first + j * step, size - kVec));
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        auto& x = kept[Source::kKeepsFloats ? j : 0];
        source.compute(raw[j], x);
        largest = fmaxf(largest, largest_of(x));
    }
    for (int at = first + kPieces * step; at < size; at += step) {
        float x[kVec];
        source.compute(source.read(blockIdx.x, at), x);
        largest = fmaxf(largest, largest_of(x));
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = largest;
    }
    __syncthreads();
#pragma unroll 4
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        largest = fmaxf(largest, scratch[warp]);
    }
    const float scale = byte_scale_of<Byte>(largest), inverse_scale = 1.0f / scale;
    if (threadIdx.x == 0) {
        rows.bytes.scales[blockIdx.x] = scale;
    }
    Byte* out = static_cast<Byte*>(rows.out) + blockIdx.x * rows.token_stride;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        auto& x = kept[Source::kKeepsFloats ? j : 0];
        if constexpr (!Source::kKeepsFloats) {
            forget(raw[j]);
            source.compute(raw[j], x);
        }
        if (first + j * step < size) {
            store_quantized(out + first + j * step, x, inverse_scale);
        }
    }
    for (int at = first + kPieces * step; at < size; at += step) {
        float x[kVec];
        source.compute(source.read(blockIdx.x, at), x);
        store_quantized(out + at, x, inverse_scale);
    }
}

// addresses: those of the source, or'ed; strides: its strides and sizes, or'ed, elements of T.
template <typename Byte, typename T, typename Source>
void launch_quantize_to(const char* op, const Source& source, uintptr_t addresses, int64_t strides,
                        const ByteRows& rows, void* stream) {
    if (rows.num_tokens == 0 || rows.size == 0) {
        return;
    }
    constexpr int kVec = kVecElements<T>;
    check((addresses | reinterpret_cast<uintptr_t>(rows.out)) % 16 == 0 && (strides | rows.size) % kVec == 0 &&
              rows.token_stride % 16 == 0,
          op, ": on CUDA the op takes addresses, rows and strides of whole 16 bytes");
    check(rows.bytes.kind != ScaleKind::block || rows.size % kScaleBlock == 0, op, ": a row has ", rows.size,
          " elements, but blocks take a multiple of ", kScaleBlock);
    const int64_t pieces = rows.size / kVec;
    constexpr int kClusterBlocks = Source::kKeepsFloats ? 4 : 1;
    if (rows.bytes.kind == ScaleKind::token && suits_row_cluster(rows.num_tokens, pieces, kClusterBlocks)) {
        return launch_quantize_row_cluster<Byte, T>(source, static_cast<Byte*>(rows.out), rows.token_stride,
                                                    rows.bytes.scales, rows.num_tokens, rows.size, stream);
    }
    if (rows.bytes.kind == ScaleKind::token) {
        const auto launch_rows = [&]<int kThreads, int kPieces, int kMinBlocks>() {
            const int64_t wanted = (pieces + 32 * kPieces - 1) / (32 * kPieces) * 32;
            const auto threads = static_cast<unsigned>(std::min<int64_t>(wanted, kThreads));
            launch(quantize_rows_kernel<T, Byte, Source, kThreads, kPieces, kMinBlocks>,
                   {.grid = dim3(static_cast<unsigned>(rows.num_tokens)), .block = dim3(threads), .pdl = true}, stream,
                   source, rows);
        };
        if constexpr (Source::kKeepsFloats) {
            launch_rows.template operator()<448, 4, 2>();
        } else if (pieces <= kQuantizeShortRow) {
            launch_rows.template operator()<128, 4, 8>();
        } else {
            launch_rows.template operator()<256, 7, 3>();
        }
        return;
    }
    const auto launch_pieces = [&]<int kThreads, int kPieces>() {
        const int64_t warps = (rows.num_tokens * pieces / num_sms() + 31) / 32;
        const auto threads = static_cast<unsigned>(std::clamp<int64_t>(warps * 32, 32, kThreads));
        const auto blocks_per_token = static_cast<unsigned>((pieces + threads * kPieces - 1) / (threads * kPieces));
        launch(quantize_pieces_kernel<T, Byte, Source, kThreads, kPieces>,
               {.grid = dim3(static_cast<unsigned>(rows.num_tokens) * blocks_per_token),
                .block = dim3(threads),
                .pdl = true},
               stream, source, rows, blocks_per_token);
    };
    // Two pieces a thread once there are blocks enough for the GPU to be full of them many times.
    if (rows.num_tokens * pieces > int64_t{num_sms()} * kQuantizeManyPieces) {
        launch_pieces.template operator()<kQuantizePairThreads, 2>();
    } else {
        launch_pieces.template operator()<kQuantizePieceThreads, 1>();
    }
}

template <typename T, typename Source>
void launch_quantize(const char* op, const Source& source, uintptr_t addresses, int64_t strides, const ByteRows& rows,
                     void* stream) {
    switch (rows.bytes.type) {
        case ByteType::e4m3: return launch_quantize_to<__nv_fp8_e4m3, T>(op, source, addresses, strides, rows, stream);
        case ByteType::int8: return launch_quantize_to<int8_t, T>(op, source, addresses, strides, rows, stream);
        default: fail(op, ": on CUDA the op gives e4m3 and int8");
    }
}

}  // namespace fastkernels
