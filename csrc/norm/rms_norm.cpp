// y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; the sum in fp32.
// Source: Zhang and Sennrich 2019.
#include "norm/row_norm.h"

namespace fastkernels::cpu::FK_ISA {

void rms_norm_cpu(const NormParams& p) {
    for_each_row(p, [&]<typename T>(const T* x, T*, T* out) {
        rms_norm_row(x, static_cast<const T*>(p.weight), out, p.size, p.eps);
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(rms_norm_cpu, NormParams)
