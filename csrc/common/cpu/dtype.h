// The CPU's C++ types of the floating dtypes, and the switch from a DType to one of them. Included by kernel
// files only: everything is in the namespace of the instruction set that the file is compiled for.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace fastkernels::cpu::FK_ISA {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

struct e4m3 {  // no infinity; 0x7f and 0xff are NaN
    uint8_t bits;
};

struct e5m2 {
    uint8_t bits;
};

inline float to_float(float x) {
    return x;
}
inline float to_float(bf16 x) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
// fp16 by its bits and without branches, since compilers make no vector code of a conversion of _Float16.
inline float to_float(fp16 x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    // Times 2^112 the exponent's bias is fp32's, for denormals too; infinity and NaN take the largest exponent.
    const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(scaled | special | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

inline float to_float(e4m3 x) {
    const uint32_t magnitude = x.bits & 0x7fu;
    const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
    const uint32_t bits = magnitude == 0x7fu ? 0x7fc00000u : std::bit_cast<uint32_t>(value);
    return std::bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x80u) << 24);
}
inline float to_float(e5m2 x) {
    return to_float(fp16{static_cast<uint16_t>(x.bits << 8)});
}
inline float to_float(int8_t x) {
    return x;
}

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u)};
}
template <>
inline fp16 from_float<fp16>(float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 leaves the denormal, rounded, in the low bits.
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t half = magnitude >= 0x47800000u ? special : finite;
    return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

// To a byte with kMantissa bits of mantissa: to nearest, ties to even; what is larger than `largest` becomes that.
template <int kMantissa, int kBias>
inline uint8_t small_float(float x, float largest) {
    const uint32_t sign = std::bit_cast<uint32_t>(x) >> 24 & 0x80u;
    if (!(x == x)) {
        return 0x7f;
    }
    const float size = std::min(std::fabs(x), largest);
    constexpr int kDrop = 23 - kMantissa;
    const uint32_t bits = std::bit_cast<uint32_t>(size);
    const uint32_t normal =
        ((bits + (1u << (kDrop - 1)) - 1 + (bits >> kDrop & 1u)) >> kDrop) - ((127 - kBias) << kMantissa);
    // Below the smallest normal the steps are equal; the sum leaves their number, rounded, in the low bits.
    constexpr float kShift = std::bit_cast<float>(static_cast<uint32_t>(127 + 1 - kBias + kDrop) << 23);
    const uint32_t small = std::bit_cast<uint32_t>(size + kShift) - std::bit_cast<uint32_t>(kShift);
    return static_cast<uint8_t>((bits < static_cast<uint32_t>(127 + 1 - kBias) << 23 ? small : normal) | sign);
}
template <>
inline e4m3 from_float<e4m3>(float x) {
    return {small_float<3, 7>(x, 448.0f)};
}
template <>
inline e5m2 from_float<e5m2>(float x) {
    return {small_float<2, 15>(x, 57344.0f)};
}
template <>
inline int8_t from_float<int8_t>(float x) {  // to nearest, ties to even, within 127; NaN becomes 0
    return x == x ? static_cast<int8_t>(std::nearbyint(std::clamp(x, -127.0f, 127.0f))) : int8_t{0};
}

// visit_byte(dtype, [&]<typename T>() { ... }): the one-byte types of a KV cache.
template <typename F>
void visit_byte(DType dtype, F&& f) {
    switch (dtype) {
        case DType::e4m3: return f.template operator()<e4m3>();
        case DType::e5m2: return f.template operator()<e5m2>();
        case DType::i8: return f.template operator()<int8_t>();
        default: fail("a KV cache of ", name(dtype), " is not supported: e4m3, e5m2 and int8 are, or the dtype of k");
    }
}

// visit_float(dtype, [&]<typename T>() { ... });
template <typename F>
void visit_float(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: return f.template operator()<float>();
        case DType::f16: return f.template operator()<fp16>();
        case DType::bf16: return f.template operator()<bf16>();
        default: fail("dtype ", name(dtype), " is not supported: fp32, fp16 and bf16 are");
    }
}

template <typename F>
void visit_index(DType dtype, F&& f) {
    switch (dtype) {
        case DType::i32: return f.template operator()<int32_t>();
        case DType::i64: return f.template operator()<int64_t>();
        default: fail("index dtype ", name(dtype), " is not supported: int32 and int64 are");
    }
}

}  // namespace fastkernels::cpu::FK_ISA
