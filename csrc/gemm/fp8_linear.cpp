// out = x W^T + bias with weights of fp8 e4m3: products and sums in fp32 of rows that are turned to floats, scales and
// all, once a task. A task owns kRows rows of the weight; x is rounded first where it is asked for.
#include <algorithm>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"
#include "fastkernels/gemm.h"
#include "gemm/dot_rows.h"
#include "gemm/weight_scales.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr int kRows = 4, kTokens = 4;

// x as floats: [num_tokens][in_size], rounded to e4m3 and scaled back where p.activation says so
template <typename T>
void read_x(const QuantizedLinearParams& p, std::vector<float>& x) {
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
        for (int64_t begin = 0; begin < p.in_size; begin += stretch) {
            const int64_t size = std::min(stretch, p.in_size - begin);
            const float scale = scale_of(row + begin, size, ByteType::e4m3);
            const float inverse = 1.0f / scale;
#pragma omp simd
            for (int64_t i = begin; i < begin + size; ++i) {
                row[i] = to_float(e4m3{to_e4m3(row[i] * inverse)}) * scale + bad;
            }
        }
    });
}

// Row `row` of the weight as floats, scaled.
void read_row(const QuantizedLinearParams& p, int64_t row, std::vector<float>& scales, float* out) {
    const int64_t num_blocks = (p.in_size + p.block_size - 1) / p.block_size;
    const uint8_t* weight = p.weight + row * p.in_size;
    scales.resize(num_blocks);
    load_scales(p, row / p.block_rows * num_blocks, num_blocks, 1.0f, scales.data());
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t begin = block * p.block_size, end = std::min(p.in_size, begin + p.block_size);
        const float scale = scales[block];
#pragma omp simd
        for (int64_t k = begin; k < end; ++k) {
            out[k] = to_float(e4m3{weight[k]}) * scale;
        }
    }
}

template <int kTokens, typename T>
inline void multiply(const QuantizedLinearParams& p, const float* rows, const float* x, int64_t row, int64_t token) {
    float y[kTokens][kMaxRows];
    dot_rows<kRows, kTokens>(rows, p.in_size, x + token * p.in_size, p.in_size, p.in_size, y);
    const int64_t num_rows = std::min<int64_t>(kRows, p.out_size - row);
    for (int n = 0; n < kTokens; ++n) {
        T* out = static_cast<T*>(p.out) + (token + n) * p.out_token_stride + row;
        for (int64_t r = 0; r < num_rows; ++r) {
            const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[row + r]);
            out[r] = from_float<T>(y[n][r] + bias);
        }
    }
}

template <typename T>
void all_rows(const QuantizedLinearParams& p) {
    static thread_local std::vector<float> activations;  // of the calling thread, which the others read
    std::vector<float>& x = activations;
    read_x<T>(p, x);
    const int64_t tasks = (p.out_size + kRows - 1) / kRows;
    // A thread gets at least 131,072 products: waking it costs as much.
    const int64_t products = kRows * p.in_size * p.num_tokens;
    parallel_for(tasks, 1 + 131072 / (products + 1), [&](int64_t task) {
        static thread_local std::vector<float> rows, scales;
        rows.resize(kRows * p.in_size);
        const int64_t row = task * kRows;
        for (int64_t r = row; r < std::min(p.out_size, row + kRows); ++r) {
            read_row(p, r, scales, rows.data() + (r - row) * p.in_size);
        }
        int64_t token = 0;
        for (; token + kTokens <= p.num_tokens; token += kTokens) {
            multiply<kTokens, T>(p, rows.data(), x.data(), row, token);
        }
        for (; token < p.num_tokens; ++token) {
            multiply<1, T>(p, rows.data(), x.data(), row, token);
        }
    });
}

}  // namespace

void fp8_linear_cpu(const QuantizedLinearParams& p) {
    visit_float(p.dtype, [&]<typename T>() { all_rows<T>(p); });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(fp8_linear_cpu, QuantizedLinearParams)
