// What the ends of matmul_sm90's two kernels share: sums as bits, where rows of the weight lie, what is added to a sum,
// out as pairs and as bytes.
#pragma once

#include "common/convert.cuh"
#include "common/sigmoid.cuh"
#include "gemm/matmul_sm90.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

__device__ __forceinline__ uint32_t sum_bits(float x) {
    return __float_as_uint(x);
}
__device__ __forceinline__ uint32_t sum_bits(int32_t x) {
    return static_cast<uint32_t>(x);
}
template <typename Sum>
__device__ __forceinline__ Sum sum_of_bits(uint32_t x) {
    if constexpr (std::is_same_v<Sum, float>) {
        return __uint_as_float(x);
    } else {
        return static_cast<Sum>(x);
    }
}

// Where a row of the tiles lies in the weight: gated, 8 rows of the gate and of up take turns. Past the edges of the
// matrix these are the last ones, whose products are not written.
__device__ __forceinline__ int matmul_weight_row(const MatmulArgs& args, int row) {
    const int at = min(row, args.rows - 1);
    return args.gated ? at / 16 * 8 + at % 8 + (at & 8 ? args.out_size : 0) : at;
}

__device__ __forceinline__ float matmul_value(const void* values, int64_t at, bool is_fp16) {
    return is_fp16 ? to_float(static_cast<const fp16*>(values)[at]) : to_float(static_cast<const bf16*>(values)[at]);
}

__device__ __forceinline__ float2 matmul_pair(uint32_t pair, bool is_fp16) {
    return is_fp16 ? __half22float2(reinterpret_cast<const __half2&>(pair))
                   : __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

__device__ __forceinline__ float matmul_bias(const MatmulArgs& args, int row) {
    return args.bias == nullptr ? 0.0f : matmul_value(args.bias, min(row, args.out_size - 1), args.is_fp16);
}

template <int kCount>
__device__ __forceinline__ void pack_out(const float (&x)[kCount], uint32_t (&pairs)[kCount / 2], bool is_fp16) {
    if (is_fp16) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const __half2 pair = __floats2half2_rn(x[i * 2], x[i * 2 + 1]);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i * 2], x[i * 2 + 1]);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    }
}

// What zero points add to a sum is the product of these.
template <typename T>
__device__ __forceinline__ MatmulSum<T> matmul_token_zero(const MatmulArgs& args, int token) {
    if constexpr (std::is_same_v<T, int8_t>) {
        return args.token_zeros == nullptr ? 0 : args.token_zeros[min(token, args.num_tokens - 1)];
    }
    return 0;
}
template <typename T>
__device__ __forceinline__ MatmulSum<T> matmul_weight_sum(const MatmulArgs& args, int row) {
    if constexpr (std::is_same_v<T, int8_t>) {
        return args.weight_sums == nullptr ? 0 : args.weight_sums[matmul_weight_row(args, row)];
    }
    return 0;
}

// A sum, with what the scales of its row and column make of it and the bias.
template <MatmulScales kScales, typename Sum>
__device__ __forceinline__ float finish_sum(Sum sum, float factor, float bias) {
    if constexpr (kScales == MatmulScales::channel) {
        return fmaf(static_cast<float>(sum), factor, bias);
    } else {
        return sum + bias;
    }
}

// Values divided by the scale as bytes.
__device__ __forceinline__ uint16_t matmul_two_bytes(float x, float y, MatmulOut type) {
    return static_cast<uint16_t>(type == MatmulOut::e4m3 ? quantize_4<__nv_fp8_e4m3>({x, y, 0, 0}, 1.0f)
                                                         : quantize_4<int8_t>({x, y, 0, 0}, 1.0f));
}
__device__ __forceinline__ uint32_t matmul_byte(float x, MatmulOut type) {
    return matmul_two_bytes(x, 0, type) & 0xff;
}

}  // namespace
}  // namespace fastkernels
