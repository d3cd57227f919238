// rms_norm whose result is bytes with scales (common/byte_scales.h), for the product that comes next.
// Source: Zhang and Sennrich 2019.
#include <vector>

#include "common/cpu/quantize_row.h"
#include "norm/row_norm.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

template <typename T>
void rms_norm_quant_row(const NormParams& p, const T* x, int64_t token) {
    const T* weight = static_cast<const T*>(p.weight);
    std::vector<float> row(p.size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < p.size; ++i) {
        const float v = to_float(x[i]);
        sum += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(p.size) + p.eps);
    float* y = row.data();
#pragma omp simd
    for (int64_t i = 0; i < p.size; ++i) {
        y[i] = to_float(x[i]) * scale * to_float(weight[i]);
    }
    quantize_row(y, static_cast<uint8_t*>(p.out) + token * p.out_token_stride, p.size, token, p.bytes);
}

}  // namespace

void rms_norm_quant_cpu(const NormParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, 1 + 16384 / (p.size + 1), [&](int64_t token) {
            rms_norm_quant_row(p, static_cast<const T*>(p.x) + token * p.x_token_stride, token);
        });
    });
}

void add_rms_norm_quant_cpu(const NormParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, 1 + 16384 / (p.size + 1), [&](int64_t token) {
            const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
            T* residual = static_cast<T*>(p.residual) + token * p.residual_token_stride;
#pragma omp simd
            for (int64_t i = 0; i < p.size; ++i) {
                residual[i] = from_float<T>(to_float(residual[i]) + to_float(x[i]));
            }
            rms_norm_quant_row<T>(p, residual, token);
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(rms_norm_quant_cpu, NormParams)
FK_CPU_ENTRY(add_rms_norm_quant_cpu, NormParams)
