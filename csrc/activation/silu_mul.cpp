// out = silu(gate) * up, silu(x) = x / (1 + e^-x). Source: Shazeer 2020 (SwiGLU).
#include "activation/gated.h"

namespace fastkernels::cpu::FK_ISA {

void silu_mul_cpu(const GatedParams& p) {
    gated(p, [](float x) { return x / (1.0f + fast_exp(-x)); });
}

void silu_mul_quant_cpu(const GatedParams& p) {
    gated_quant(p, [](float x) { return x / (1.0f + fast_exp(-x)); });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(silu_mul_cpu, GatedParams)
FK_CPU_ENTRY(silu_mul_quant_cpu, GatedParams)
