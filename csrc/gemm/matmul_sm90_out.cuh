// What the ends of matmul_sm90's two kernels share: sums as bits, the bias, pairs of out.
#pragma once

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

// Past the edges of the matrix the last ones, whose products are not written.
__device__ __forceinline__ float matmul_bias(const MatmulArgs& args, int row) {
    if (args.bias == nullptr) {
        return 0.0f;
    }
    const int at = min(row, args.out_size - 1);
    return args.out_is_fp16 ? to_float(static_cast<const fp16*>(args.bias)[at])
                            : to_float(static_cast<const bf16*>(args.bias)[at]);
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
        return args.weight_sums == nullptr ? 0 : args.weight_sums[min(row, args.out_size - 1)];
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

}  // namespace
}  // namespace fastkernels
