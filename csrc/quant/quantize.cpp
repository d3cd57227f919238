// out = x * (1 / scale) in fp32, rounded to nearest and even, with one scale or one a token or a block of 128 elements.
// A task owns one token.
#include <vector>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "common/cpu/quantize_row.h"
#include "fastkernels/quant.h"

namespace fastkernels::cpu::FK_ISA {

void quantize_cpu(const QuantizeParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, 1 + 16384 / (p.size + 1), [&](int64_t token) {
            const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
            std::vector<float> row(p.size);
            for (int64_t i = 0; i < p.size; ++i) {
                row[i] = to_float(x[i]);
            }
            quantize_row(row.data(), static_cast<uint8_t*>(p.out) + token * p.out_token_stride, p.size, token, p.bytes);
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(quantize_cpu, QuantizeParams)
