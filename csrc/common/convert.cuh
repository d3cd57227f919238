// Pieces of a row as floats, and back: two elements an instruction where the type has one. And 8-bit outputs.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common/byte_scales.h"
#include "common/vec.cuh"

namespace fastkernels {

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Vec<T, N>& v, float (&x)[N]) {
    if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {  // by words: by halves they would take a register each
        const uint32_t* words = reinterpret_cast<const uint32_t*>(v.data);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = to_float(v[i]);
        }
    }
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> from_floats(const float (&x)[N]) {
    Vec<T, N> v;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
        Pair* pairs = reinterpret_cast<Pair*>(v.data);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            if constexpr (std::is_same_v<T, bf16>) {
                pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            } else {
                pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            v[i] = from_float<T>(x[i]);
        }
    }
    return v;
}

// Makes the compiler keep v as it is in registers, and not what it was converted to before.
template <typename T, int N>
__device__ __forceinline__ void forget(Vec<T, N>& v) {
    if constexpr (N * sizeof(T) % 4 == 0) {
        uint32_t* words = reinterpret_cast<uint32_t*>(v.data);
#pragma unroll
        for (int i = 0; i < static_cast<int>(N * sizeof(T) / 4); ++i) {
            asm volatile("" : "+r"(words[i]));
        }
    }
}

// Four bytes of one word: x times inverse_scale, rounded to nearest and even, at most the type's largest value.
template <typename Byte>
__device__ __forceinline__ uint32_t quantize_4(const float (&x)[4], float inverse_scale) {
    if constexpr (!std::is_same_v<Byte, int8_t>) {
        constexpr auto kType = std::is_same_v<Byte, __nv_fp8_e4m3> ? __NV_E4M3 : __NV_E5M2;
        const auto pair = [&](float a, float b) {
            return static_cast<uint32_t>(
                __nv_cvt_float2_to_fp8x2(make_float2(a * inverse_scale, b * inverse_scale), __NV_SATFINITE, kType));
        };
        return pair(x[0], x[1]) | pair(x[2], x[3]) << 16;
    } else {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float y = fminf(fmaxf(rintf(x[i] * inverse_scale), -128.0f), 127.0f);
            word |= (static_cast<uint32_t>(static_cast<int>(y)) & 0xffu) << (8 * i);
        }
        return word;
    }
}

// N values, a multiple of 4, to N bytes at p, which is aligned to them.
template <typename Byte, int N>
__device__ __forceinline__ void store_quantized(Byte* p, const float (&x)[N], float inverse_scale) {
    Vec<uint32_t, N / 4> words;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        words[i] = quantize_4<Byte>({x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]}, inverse_scale);
    }
    store_vec(reinterpret_cast<uint32_t*>(p), words);
}

template <typename Byte>
inline constexpr float kLargestByte = largest_byte(std::is_same_v<Byte, int8_t>          ? ByteType::int8
                                                   : std::is_same_v<Byte, __nv_fp8_e5m2> ? ByteType::e5m2
                                                                                         : ByteType::e4m3);

template <int N>
__device__ __forceinline__ float largest_of(const float (&x)[N]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        largest = fmaxf(largest, fabsf(x[i]));
    }
    return largest;
}

// largest / kLargestByte, rounded as the division is, at a third of its instructions; at least kLeastScale.
template <typename Byte>
__device__ __forceinline__ float byte_scale_of(float largest) {
    constexpr float kInverse = 1.0f / kLargestByte<Byte>;
    const float near = largest * kInverse;
    const float exact = fmaf(fmaf(-kLargestByte<Byte>, near, largest), kInverse, near);
    return near < __int_as_float(0x7f800000) ? fmaxf(exact, kLeastScale) : near;  // infinity stays itself
}

// The scale of kScaleBlock elements, N in each of so many neighbouring lanes, which all call it.
template <typename Byte, int N>
__device__ __forceinline__ float block_scale(const float (&x)[N]) {
    constexpr int kLanes = kScaleBlock / N;
    static_assert(kLanes == 16 || kLanes == 32);
    const unsigned lanes = kLanes == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16);
    float largest = largest_of(x);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, offset));
    }
    return byte_scale_of<Byte>(largest);
}

}  // namespace fastkernels
