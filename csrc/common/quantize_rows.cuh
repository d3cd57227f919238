// Rows of floats, wherever they come from, to bytes with scales.
//
//   out  [num_tokens, size] e4m3 | int8     scales  as byte_scales.h says, row-major
//
// A Source makes the floats: source.load(token, at, x) fills x with kVecElements<T> of them from column `at` on. One
// scale for all, or one for each kScaleBlock: a thread owns one piece of a row, and the lanes of a block of it share
// their maximum. A scale a token: a block of threads owns a row, keeps kQuantizePieces pieces a thread as floats and
// makes those beyond a second time.
#pragma once

#include <algorithm>

#include "common/byte_scales.h"
#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"

namespace fastkernels {

struct ByteRows {
    void* out;
    int64_t token_stride;
    int64_t num_tokens, size;
    ByteScales bytes;
};

inline constexpr int kQuantizePieceThreads = 256, kQuantizeRowThreads = 512, kQuantizePieces = 4;

template <int kVec>
__device__ __forceinline__ float largest_of(const float (&x)[kVec]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        largest = fmaxf(largest, fabsf(x[i]));
    }
    return largest;
}

template <typename T, typename Byte, typename Source>
__global__ void __launch_bounds__(kQuantizePieceThreads)
    quantize_pieces_kernel(const Source source, const ByteRows rows, unsigned blocks_per_token) {
    constexpr int kVec = kVecElements<T>, kLanes = kScaleBlock / kVec;
    const unsigned token = blockIdx.x / blocks_per_token;
    const int at = static_cast<int>((blockIdx.x - token * blocks_per_token) * blockDim.x + threadIdx.x) * kVec;
    pdl_launch_dependents();
    pdl_wait();
    if (at >= rows.size) {  // whole blocks of kScaleBlock
        return;
    }
    float x[kVec], inverse_scale;
    source.load(token, at, x);
    if (rows.bytes.kind == ScaleKind::tensor) {
        inverse_scale = 1.0f / *rows.bytes.scales;
    } else {
        float largest = largest_of(x);
        const unsigned lanes = kLanes == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, offset));
        }
        const float scale = fmaxf(largest / kLargestByte<Byte>, kLeastScale);
        inverse_scale = 1.0f / scale;
        if (threadIdx.x % kLanes == 0) {
            rows.bytes.scales[token * (rows.size / kScaleBlock) + at / kScaleBlock] = scale;
        }
    }
    store_quantized(static_cast<Byte*>(rows.out) + token * rows.token_stride + at, x, inverse_scale);
}

template <typename T, typename Byte, typename Source>
__global__ void __launch_bounds__(kQuantizeRowThreads) quantize_rows_kernel(const Source source, const ByteRows rows) {
    constexpr int kVec = kVecElements<T>;
    __shared__ float scratch[kQuantizeRowThreads / 32];
    const unsigned token = blockIdx.x;
    const int size = static_cast<int>(rows.size), step = blockDim.x * kVec, first = threadIdx.x * kVec;
    Byte* out = static_cast<Byte*>(rows.out) + token * rows.token_stride;
    pdl_launch_dependents();
    pdl_wait();
    float kept[kQuantizePieces][kVec], largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuantizePieces; ++j) {
        if (first + j * step < size) {
            source.load(token, first + j * step, kept[j]);
            largest = fmaxf(largest, largest_of(kept[j]));
        }
    }
    for (int at = first + kQuantizePieces * step; at < size; at += step) {
        float x[kVec];
        source.load(token, at, x);
        largest = fmaxf(largest, largest_of(x));
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = largest;
    }
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        largest = fmaxf(largest, scratch[warp]);
    }
    const float scale = fmaxf(largest / kLargestByte<Byte>, kLeastScale), inverse_scale = 1.0f / scale;
    if (threadIdx.x == 0) {
        rows.bytes.scales[token] = scale;
    }
#pragma unroll
    for (int j = 0; j < kQuantizePieces; ++j) {
        if (first + j * step < size) {
            store_quantized(out + first + j * step, kept[j], inverse_scale);
        }
    }
    for (int at = first + kQuantizePieces * step; at < size; at += step) {
        float x[kVec];
        source.load(token, at, x);
        store_quantized(out + at, x, inverse_scale);
    }
}

// addresses: those of the source, or'ed; strides: its strides and sizes, or'ed, elements of T.
template <typename T, typename Source>
void launch_quantize(const char* op, const Source& source, uintptr_t addresses, int64_t strides, const ByteRows& rows,
                     void* stream) {
    if (rows.num_tokens == 0 || rows.size == 0) {
        return;
    }
    constexpr int kVec = kVecElements<T>;
    check((addresses | reinterpret_cast<uintptr_t>(rows.out)) % 16 == 0 && (strides | rows.size) % kVec == 0 &&
              rows.token_stride % 16 == 0,
          op, ": on CUDA the op takes addresses, rows and strides of whole 16 bytes");
    check(rows.bytes.kind != ScaleKind::block || rows.size % kScaleBlock == 0, op, ": a row has ", rows.size,
          " elements, but blocks take a multiple of ", kScaleBlock);
    const auto run = [&]<typename Byte>() {
        const int64_t pieces = rows.size / kVec;
        if (rows.bytes.kind == ScaleKind::token) {
            const int64_t wanted = (pieces + 32 * kQuantizePieces - 1) / (32 * kQuantizePieces) * 32;
            const auto threads = static_cast<unsigned>(std::min<int64_t>(wanted, kQuantizeRowThreads));
            launch(quantize_rows_kernel<T, Byte, Source>,
                   {.grid = dim3(static_cast<unsigned>(rows.num_tokens)), .block = dim3(threads), .pdl = true}, stream,
                   source, rows);
        } else {
            const int64_t warps = (rows.num_tokens * pieces / num_sms() + 31) / 32;
            const auto threads = static_cast<unsigned>(std::clamp<int64_t>(warps * 32, 32, kQuantizePieceThreads));
            const auto blocks_per_token = static_cast<unsigned>((pieces + threads - 1) / threads);
            launch(quantize_pieces_kernel<T, Byte, Source>,
                   {.grid = dim3(static_cast<unsigned>(rows.num_tokens) * blocks_per_token),
                    .block = dim3(threads),
                    .pdl = true},
                   stream, source, rows, blocks_per_token);
        }
    };
    if (rows.bytes.type == ByteType::e4m3) {
        run.template operator()<__nv_fp8_e4m3>();
    } else {
        run.template operator()<int8_t>();
    }
}

}  // namespace fastkernels
