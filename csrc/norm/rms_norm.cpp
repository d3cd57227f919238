// y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; the sum in fp32. A task owns one row.
// Source: Zhang and Sennrich 2019.
#include <cmath>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/norm.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
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

}  // namespace

void rms_norm_cpu(const RmsNormParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens * p.num_heads, 1 + 16384 / (p.size + 1), [&](int64_t row) {
            const int64_t token = row / p.num_heads, head = row % p.num_heads;
            norm_row(static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride,
                     static_cast<const T*>(p.weight),
                     static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride, p.size, p.eps);
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(rms_norm_cpu, RmsNormParams)
