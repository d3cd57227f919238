// out = gelu(gate) * up; gelu(x) = x Phi(x), Phi the standard normal's cumulative distribution, or the approximation
// x / 2 (1 + tanh u) = x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
// Source: Hendrycks and Gimpel 2016; Shazeer 2020 (GEGLU).
#include "activation/gated.h"

namespace fastkernels::cpu::FK_ISA {

void gelu_mul_cpu(const GatedParams& p) {
    if (p.approximate_tanh) {
        gated(p, [](float x) { return x / (1.0f + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x))); });
    } else {
        gated(p, [](float x) { return x * fast_normal_cdf(x); });
    }
}

void gelu_mul_quant_cpu(const GatedParams& p) {
    if (p.approximate_tanh) {
        gated_quant(p, [](float x) { return x / (1.0f + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x))); });
    } else {
        gated_quant(p, [](float x) { return x * fast_normal_cdf(x); });
    }
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(gelu_mul_cpu, GatedParams)
FK_CPU_ENTRY(gelu_mul_quant_cpu, GatedParams)
