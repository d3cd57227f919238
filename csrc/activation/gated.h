// What the gated activations' CPU kernels share: out = f(gate) * up. A task owns a stretch of one token's row.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/dtype.h"
#include "common/cpu/math.h"
#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"
#include "fastkernels/activation.h"

namespace fastkernels::cpu::FK_ISA {

// f(float) -> float, without branches or calls.
template <typename F>
void gated(const GatedParams& p, const F& f) {
    constexpr int64_t kStretch = 4096;  // elements
    const int64_t stretches = (p.size + kStretch - 1) / kStretch;
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens * stretches, 1 + 8192 / (p.size + 1), [&](int64_t task) {
            const int64_t token = task / stretches, begin = task % stretches * kStretch;
            const int64_t count = std::min(kStretch, p.size - begin);
            const T* gate = static_cast<const T*>(p.x) + token * p.x_token_stride + begin;
            const T* up = gate + p.size;
            T* out = static_cast<T*>(p.out) + token * p.out_token_stride + begin;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                out[i] = from_float<T>(f(to_float(gate[i])) * to_float(up[i]));
            }
        });
    });
}

// The same to bytes with scales. A task owns one token.
template <typename F>
void gated_quant(const GatedParams& p, const F& f) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, 1 + 8192 / (p.size + 1), [&](int64_t token) {
            const T* gate = static_cast<const T*>(p.x) + token * p.x_token_stride;
            const T* up = gate + p.size;
            std::vector<float> row(p.size);
            float* y = row.data();
#pragma omp simd
            for (int64_t i = 0; i < p.size; ++i) {
                y[i] = f(to_float(gate[i])) * to_float(up[i]);
            }
            quantize_row(y, static_cast<uint8_t*>(p.out) + token * p.out_token_stride, p.size, token, p.bytes);
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA
