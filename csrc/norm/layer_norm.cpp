// y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, over the last dimension; the sums in fp32.
// Source: Ba, Kiros and Hinton 2016.
#include "norm/row_norm.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

template <typename T>
void layer_norm_row(const T* x, const T* weight, const T* bias, T* out, int64_t size, float eps) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
        sum += to_float(x[i]);
    }
    const float mean = sum / static_cast<float>(size);
    // A pass of its own: mean(x^2) - mean(x)^2 would cancel.
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) {
        const float v = to_float(x[i]) - mean;
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = from_float<T>((to_float(x[i]) - mean) * scale * to_float(weight[i]) + to_float(bias[i]));
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = from_float<T>((to_float(x[i]) - mean) * scale * to_float(weight[i]));
        }
    }
}

}  // namespace

void layer_norm_cpu(const NormParams& p) {
    for_each_row(p, [&]<typename T>(const T* x, T*, T* out) {
        layer_norm_row(x, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), out, p.size, p.eps);
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(layer_norm_cpu, NormParams)
