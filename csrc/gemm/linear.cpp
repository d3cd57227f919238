// out = x weight^T + bias for a few tokens: a task owns kRows rows of the weight, reads them once and multiplies them
// with up to kTokens tokens at a time. Sums in fp32, kWidth lanes along K that are added at the end. Gated, its rows
// are of the gate, and those of up follow.
#include <algorithm>
#include <cmath>

#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "fastkernels/gemm.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr int kMaxRows = 8;

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
            if constexpr (kTokens == 1) {
                __builtin_prefetch(weight + (r + kRows) * weight_stride + k);  // the next task's rows
            }
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

template <int kRows, int kTokens, typename T>
inline void multiply(const LinearParams& p, int64_t row, int64_t token) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.weight_row_stride;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
    float y[kTokens][kMaxRows];
    dot_rows<kRows, kTokens>(weight, p.weight_row_stride, x, p.x_token_stride, p.in_size, y);
    if (p.gated) {
        float up[kTokens][kMaxRows];
        dot_rows<kRows, kTokens>(weight + p.out_size * p.weight_row_stride, p.weight_row_stride, x, p.x_token_stride,
                                 p.in_size, up);
        for (int n = 0; n < kTokens; ++n) {
            for (int r = 0; r < kRows; ++r) {
                y[n][r] = y[n][r] / (1.0f + std::exp(-y[n][r])) * up[n][r];
            }
        }
    }
    for (int n = 0; n < kTokens; ++n) {
        T* out = static_cast<T*>(p.out) + (token + n) * p.out_token_stride + row;
        for (int r = 0; r < kRows; ++r) {
            const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[row + r]);
            out[r] = from_float<T>(y[n][r] + bias);
        }
    }
}

// A single token has one product a load, so twice the rows keep the units busy.
template <int kRows, int kTokens, typename T>
void all_rows(const LinearParams& p) {
    const int64_t tasks = (p.out_size + kRows - 1) / kRows;
    // A thread gets at least 131,072 products: waking it costs as much.
    const int64_t products = kRows * p.in_size * p.num_tokens;
    parallel_for(tasks, 1 + 131072 / (products + 1), [&](int64_t task) {
        const int64_t row = task * kRows, rows = std::min<int64_t>(kRows, p.out_size - row);
        int64_t token = 0;
        if (rows == kRows) {
            for (; token + kTokens <= p.num_tokens; token += kTokens) {
                multiply<kRows, kTokens, T>(p, row, token);
            }
        }
        for (; token < p.num_tokens; ++token) {
            if (rows == kRows) {
                multiply<kRows, 1, T>(p, row, token);
            } else {
                for (int64_t r = 0; r < rows; ++r) {
                    multiply<1, 1, T>(p, row + r, token);
                }
            }
        }
    });
}

}  // namespace

void linear_cpu(const LinearParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        if (p.num_tokens == 1) {
            all_rows<kMaxRows, 1, T>(p);
        } else {
            all_rows<4, 4, T>(p);
        }
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(linear_cpu, LinearParams)
