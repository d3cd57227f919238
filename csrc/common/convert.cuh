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
        // Added to 1.5 * 2^23, a float is rounded to an integer, which is then in its low bits: conversions are slow.
        const auto rounded = [&](float v) {
            return __float_as_uint(fminf(fmaxf(v * inverse_scale, -128.0f), 127.0f) + 12582912.0f);
        };
        return __byte_perm(__byte_perm(rounded(x[0]), rounded(x[1]), 0x0040),
                           __byte_perm(rounded(x[2]), rounded(x[3]), 0x0040), 0x5410);
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

// largest[j] of each lane is of piece j, and kLanes neighbouring lanes share a block in every piece. Returns the
// largest of piece threadIdx.x % kPieces: with every step but the last ones a lane answers for half as many pieces. All
// lanes of the warp call it; kPieces is a power of two up to kLanes.
template <int kLanes, int kPieces>
__device__ __forceinline__ float largest_of_block(float (&largest)[kPieces]) {
    int offset = 1;
#pragma unroll
    for (int left = kPieces; left > 1; left /= 2) {
        const bool upper = threadIdx.x & offset;
#pragma unroll
        for (int j = 0; j < left / 2; ++j) {
            const float kept = upper ? largest[2 * j + 1] : largest[2 * j];
            const float given = upper ? largest[2 * j] : largest[2 * j + 1];
            largest[j] = fmaxf(kept, __shfl_xor_sync(0xffffffffu, given, offset));
        }
        offset *= 2;
    }
#pragma unroll
    for (; offset < kLanes; offset *= 2) {
        largest[0] = fmaxf(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], offset));
    }
    return largest[0];
}

// The scale of kScaleBlock elements, N in each of so many neighbouring lanes. All lanes of the warp call it.
template <typename Byte, int N>
__device__ __forceinline__ float block_scale(const float (&x)[N]) {
    float largest[1] = {largest_of(x)};
    return byte_scale_of<Byte>(largest_of_block<kScaleBlock / N>(largest));
}

}  // namespace fastkernels
