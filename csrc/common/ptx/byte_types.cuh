// The one-byte types of a KV cache, e4m3, e5m2 and int8: to pairs of fp16, exactly, and from fp32.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "common/vec.cuh"

namespace fastkernels {

using e4m3 = __nv_fp8_e4m3;
using e5m2 = __nv_fp8_e5m2;

template <typename T>
inline constexpr bool kIsByte = sizeof(T) == 1;

// Bytes a..d of x, in the order of the selector's nibbles from the lowest; 4 to 7 are those of y.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(selector));
    return z;
}

// The four values of x as two pairs: (0, 1) and (2, 3), or with kAcross (0, 2) and (1, 3).
template <typename Byte, bool kAcross>
__device__ __forceinline__ void unpack_bytes(uint32_t x, uint32_t& first, uint32_t& second) {
    if constexpr (std::is_same_v<Byte, int8_t>) {
        x ^= 0x80808080u;  // byte + 128; 0x6400 + that is the fp16 of 1024 + 128 + byte
        const __half2 offset = __half2half2(__ushort_as_half(0x6480));
        first = permute_bytes(x, 0x64646464u, kAcross ? 0x4240 : 0x4140);
        second = permute_bytes(x, 0x64646464u, kAcross ? 0x4341 : 0x4342);
        *reinterpret_cast<__half2*>(&first) = __hsub2(*reinterpret_cast<__half2*>(&first), offset);
        *reinterpret_cast<__half2*>(&second) = __hsub2(*reinterpret_cast<__half2*>(&second), offset);
    } else if constexpr (std::is_same_v<Byte, e5m2>) {  // the upper byte of an fp16
        first = permute_bytes(x, 0, kAcross ? 0x2404 : 0x1404);
        second = permute_bytes(x, 0, kAcross ? 0x3414 : 0x3424);
    } else {
        static_assert(std::is_same_v<Byte, e4m3>);
#if __CUDA_ARCH__ >= 890
        if (kAcross) {
            x = permute_bytes(x, 0, 0x3120);
        }
        asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, low;\n\t"
            "cvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
            : "=r"(first), "=r"(second)
            : "r"(x));
#else
        // Exponent and mantissa a bit lower are the fp16 of 2^-8 times the value; NaN becomes 480.
        const __half2 factor = __half2half2(__ushort_as_half(0x5c00));
        first = permute_bytes(x, 0, kAcross ? 0x2404 : 0x1404);
        second = permute_bytes(x, 0, kAcross ? 0x3414 : 0x3424);
        first = (first & 0x80008000u) | ((first & 0x7f007f00u) >> 1);
        second = (second & 0x80008000u) | ((second & 0x7f007f00u) >> 1);
        *reinterpret_cast<__half2*>(&first) = __hmul2(*reinterpret_cast<__half2*>(&first), factor);
        *reinterpret_cast<__half2*>(&second) = __hmul2(*reinterpret_cast<__half2*>(&second), factor);
#endif
    }
}

// To nearest, ties to even, saturated; NaN stays NaN, but becomes 0 in int8.
template <typename Byte>
__device__ __forceinline__ uint8_t to_byte(float x) {
    if constexpr (std::is_same_v<Byte, int8_t>) {
        return static_cast<uint8_t>(static_cast<int8_t>(x == x ? __float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f)) : 0));
    } else {
        return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, std::is_same_v<Byte, e4m3> ? __NV_E4M3 : __NV_E5M2);
    }
}

// Four of them as a word, by pairs where the type has an instruction for two.
template <typename Byte>
__device__ __forceinline__ uint32_t to_bytes_4(const float (&x)[4]) {
    if constexpr (std::is_same_v<Byte, int8_t>) {
        // Added to 1.5 * 2^23, a float is rounded to an integer, which is then in its low bits: conversions are slow.
        const auto rounded = [](float v) {
            const float inside = fminf(fmaxf(v, -127.0f), 127.0f);
            return __float_as_uint((v == v ? inside : 0.0f) + 12582912.0f);
        };
        return permute_bytes(permute_bytes(rounded(x[0]), rounded(x[1]), 0x0040),
                             permute_bytes(rounded(x[2]), rounded(x[3]), 0x0040), 0x5410);
    } else {
        constexpr auto kType = std::is_same_v<Byte, e4m3> ? __NV_E4M3 : __NV_E5M2;
        const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x[0], x[1]), __NV_SATFINITE, kType);
        return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(make_float2(x[2], x[3]), __NV_SATFINITE, kType))
                         << 16;
    }
}

// kVec neighbouring elements divided by scale, as bytes. The quotient is x * (1 / scale) and one step of Newton's,
// which rounds as the division does: by trial for every mantissa of scale and of a 16-bit x, and for 2e7 pairs of an
// fp32 one.
template <typename Byte, int kVec>
__device__ __forceinline__ void store_bytes(void* out, float (&x)[kVec], float scale) {
    if (scale != 1.0f) {
        const float inverse = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            const float near = x[i] * inverse, rounded = fmaf(fmaf(-near, scale, x[i]), inverse, near);
            x[i] = fabsf(near) < 0x1p20f ? rounded : near;  // beyond, bytes are saturated
        }
    }
    if constexpr (kVec % 4 == 0) {
        Vec<uint32_t, kVec / 4> words;
#pragma unroll
        for (int i = 0; i < kVec / 4; ++i) {
            words[i] = to_bytes_4<Byte>({x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]});
        }
        store_vec(static_cast<uint32_t*>(out), words);
    } else {
        static_assert(kVec == 1);
        *static_cast<uint8_t*>(out) = to_byte<Byte>(x[0]);
    }
}

// visit_byte(dtype, [&]<typename Byte>() { ... }): the one-byte types of a KV cache.
template <typename F>
void visit_byte(DType dtype, F&& f) {
    switch (dtype) {
        case DType::e4m3: return f.template operator()<e4m3>();
        case DType::e5m2: return f.template operator()<e5m2>();
        case DType::i8: return f.template operator()<int8_t>();
        default: fail("a KV cache of ", name(dtype), " is not supported: e4m3, e5m2 and int8 are, or the dtype of k");
    }
}

}  // namespace fastkernels
