// What the norms' CPU kernels share: the loop over rows. A task owns one row.
#pragma once

#include <cmath>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/norm.h"

namespace fastkernels::cpu::FK_ISA {

// norm_row.operator()<T>(x, residual, out) for every row; residual is null where p has none.
template <typename NormRow>
void for_each_row(const NormParams& p, const NormRow& norm_row) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens * p.num_heads, 1 + 16384 / (p.size + 1), [&](int64_t row) {
            const int64_t token = row / p.num_heads, head = row % p.num_heads;
            T* residual = static_cast<T*>(p.residual);
            norm_row.template operator()<T>(
                static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride,
                residual ? residual + token * p.residual_token_stride + head * p.residual_head_stride : nullptr,
                static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride);
        });
    });
}

// out = x / sqrt(mean(x^2) + eps) * weight of one row
template <typename T>
void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
        const float v = to_float(x[i]);
        sum += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        out[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
    }
}

}  // namespace fastkernels::cpu::FK_ISA
