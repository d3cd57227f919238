// residual = residual + x, rounded to its dtype; out = rms_norm(residual); the sum in fp32.
// Source: Zhang and Sennrich 2019.
#include "norm/row_norm.h"

namespace fastkernels::cpu::FK_ISA {

void add_rms_norm_cpu(const NormParams& p) {
    for_each_row(p, [&]<typename T>(const T* x, T* residual, T* out) {
#pragma omp simd
        for (int64_t i = 0; i < p.size; ++i) {
            residual[i] = from_float<T>(to_float(residual[i]) + to_float(x[i]));
        }
        rms_norm_row(residual, static_cast<const T*>(p.weight), out, p.size, p.eps);
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(add_rms_norm_cpu, NormParams)
