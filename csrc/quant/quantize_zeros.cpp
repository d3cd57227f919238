// out = x * (1 / scale) + zero, int8, with a scale and a zero point a token (fastkernels/quant.h). A task owns one
// token.
#include <vector>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"
#include "fastkernels/quant.h"

namespace fastkernels::cpu::FK_ISA {

void quantize_zeros_cpu(const QuantizeZerosParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, 1 + 16384 / (p.size + 1), [&](int64_t token) {
            const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
            std::vector<float> row(p.size);
            for (int64_t i = 0; i < p.size; ++i) {
                row[i] = to_float(x[i]);
            }
            const ScaleAndZero by = scale_and_zero_of(row.data(), p.size);
            p.scales[token] = by.scale;
            p.zeros[token] = by.zero;
            for (int64_t i = 0; i < p.size; ++i) {
                p.out[token * p.out_token_stride + i] = by.byte(row[i]);
            }
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(quantize_zeros_cpu, QuantizeZerosParams)
