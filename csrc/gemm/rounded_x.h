// Activations rounded to fp8 and scaled back: what a product of bytes with their scales is a product of. Included by
// CPU kernel files only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"
#include "fastkernels/gemm.h"

namespace fastkernels::cpu::FK_ISA {

// x as floats: [num_tokens][in_size], rounded to fp8 and scaled back where p.activation says so
template <typename T>
void round_x(const QuantizedLinearParams& p, std::vector<float>& x) {
    x.resize(p.num_tokens * p.in_size);
    parallel_for(p.num_tokens, 1 + 16384 / (p.in_size + 1), [&](int64_t token) {
        const T* from = static_cast<const T*>(p.x) + token * p.x_token_stride;
        float* row = x.data() + token * p.in_size;
        float bad = 0.0f;  // 0 x NaN and 0 x infinity are NaN
#pragma omp simd reduction(+ : bad)
        for (int64_t i = 0; i < p.in_size; ++i) {
            row[i] = to_float(from[i]);
            bad += row[i] * 0.0f;
        }
        if (p.activation == Activation::none) {
            return;
        }
        const int64_t stretch = p.activation == Activation::e4m3_block ? kScaleBlock : p.in_size;
        const ByteType type = p.activation == Activation::e5m2_token ? ByteType::e5m2 : ByteType::e4m3;
        for (int64_t begin = 0; begin < p.in_size; begin += stretch) {
            const int64_t size = std::min(stretch, p.in_size - begin);
            const float scale = scale_of(row + begin, size, type);
            const float inverse = 1.0f / scale;
            const auto round_all = [&](auto round) {
#pragma omp simd
                for (int64_t i = begin; i < begin + size; ++i) {
                    row[i] = round(row[i] * inverse) * scale + bad;
                }
            };
            if (type == ByteType::e5m2) {
                round_all([](float x) { return to_float(e5m2{to_e5m2(x)}); });
            } else {
                round_all([](float x) { return to_float(e4m3{to_e4m3(x)}); });
            }
        }
    });
}

}  // namespace fastkernels::cpu::FK_ISA
