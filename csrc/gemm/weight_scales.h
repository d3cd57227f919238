// Scales of a quantised weight as floats, whatever they are stored as. Included by CPU kernel files only.
#pragma once

#include <bit>
#include <cstdint>

#include "common/cpu/dtype.h"
#include "fastkernels/gemm.h"

namespace fastkernels::cpu::FK_ISA {

struct e8m0 {  // 2^(bits - 127); 255 is NaN
    uint8_t bits;
};

inline float to_float(e8m0 x) {
    const uint32_t normal = x.bits == 0xff ? 0x7fc00000u : static_cast<uint32_t>(x.bits) << 23;
    return std::bit_cast<float>(x.bits == 0 ? 0x00400000u : normal);
}

// out[i] = factor * scales[begin + i]
template <typename T>
inline void convert_scales(const void* scales, int64_t begin, int64_t size, float factor, float* out) {
    const T* from = static_cast<const T*>(scales) + begin;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        out[i] = factor * to_float(from[i]);
    }
}

inline void load_scales(const QuantizedLinearParams& p, int64_t begin, int64_t size, float factor, float* out) {
    factor *= p.global_scale == nullptr ? 1.0f : *p.global_scale;
    switch (p.scale_type) {
        case ScaleType::f32: return convert_scales<float>(p.scales, begin, size, factor, out);
        case ScaleType::f16: return convert_scales<fp16>(p.scales, begin, size, factor, out);
        case ScaleType::bf16: return convert_scales<bf16>(p.scales, begin, size, factor, out);
        case ScaleType::e4m3: return convert_scales<e4m3>(p.scales, begin, size, factor, out);
        case ScaleType::e8m0: return convert_scales<e8m0>(p.scales, begin, size, factor, out);
    }
}

}  // namespace fastkernels::cpu::FK_ISA
