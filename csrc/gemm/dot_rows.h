// Products of a few rows of a weight with a few tokens. Sums in fp32, kWidth lanes along K that are added at the end.
// Included by CPU kernel files only.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"

namespace fastkernels::cpu::FK_ISA {

inline constexpr int kMaxRows = 8;

// out[n][r] = x row n . weight row r; rows at a distance of their strides.
template <int kRows, int kTokens, typename T>
inline void dot_rows(const T* weight, int64_t weight_stride, const T* x, int64_t x_stride, int64_t size,
                     float (&out)[kTokens][kMaxRows]) {
    Vec sum[kTokens][kRows] = {};
    int64_t k = 0;
    for (; k + kWidth <= size; k += kWidth) {
        Vec w[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            w[r] = load(weight + r * weight_stride + k);
        }
#pragma GCC unroll 4
        for (int n = 0; n < kTokens; ++n) {
            const Vec v = load(x + n * x_stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                sum[n][r] += w[r] * v;
            }
        }
    }
    for (int n = 0; n < kTokens; ++n) {
        for (int r = 0; r < kRows; ++r) {
            float total = 0.0f;
            for (int i = 0; i < kWidth; ++i) {
                total += sum[n][r][i];
            }
            for (int64_t rest = k; rest < size; ++rest) {
                total += to_float(weight[r * weight_stride + rest]) * to_float(x[n * x_stride + rest]);
            }
            out[n][r] = total;
        }
    }
}

}  // namespace fastkernels::cpu::FK_ISA
