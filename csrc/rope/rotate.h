// What the CPU kernels of rope and rope_append_kv share: one head turned.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/rope.h"

namespace fastkernels::cpu::FK_ISA {

// The row of cos_sin of a token; a position outside the table takes its nearest row.
inline const float* cos_sin_row(const RopeParams& p, int64_t token) {
    const int64_t position = p.position_dtype == DType::i32 ? static_cast<const int32_t*>(p.positions)[token]
                                                            : static_cast<const int64_t*>(p.positions)[token];
    return p.cos_sin + std::clamp<int64_t>(position, 0, p.max_position - 1) * p.rotary_dim;
}

// y = x turned, of one head; y may be x.
template <typename T>
void rotate_head(const RopeParams& p, const T* x, T* y, const float* cos_sin) {
    const int64_t half = p.rotary_dim / 2;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    if (p.interleaved) {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
            y[2 * i] = from_float<T>(a * cosine[i] - b * sine[i]);
            y[2 * i + 1] = from_float<T>(b * cosine[i] + a * sine[i]);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = to_float(x[i]), b = to_float(x[half + i]);
            y[i] = from_float<T>(a * cosine[i] - b * sine[i]);
            y[half + i] = from_float<T>(b * cosine[i] + a * sine[i]);
        }
    }
    if (y != x) {
        std::memcpy(y + p.rotary_dim, x + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
    }
}

// Tokens that one thread takes at least.
inline int64_t rope_grain(const RopeParams& p) {
    return 1 + 16384 / (int64_t{p.num_q_heads + p.num_kv_heads} * p.head_dim + 1);
}

}  // namespace fastkernels::cpu::FK_ISA
