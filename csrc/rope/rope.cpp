// q and k turned by the angles of their positions (the formula: fastkernels/rope.h). A task owns one token.
// Source: Su et al. 2021.
#include "rope/rotate.h"

namespace fastkernels::cpu::FK_ISA {

void rope_cpu(const RopeParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, rope_grain(p), [&](int64_t token) {
            const float* cos_sin = cos_sin_row(p, token);
            for (int64_t head = 0; head < p.num_q_heads; ++head) {
                rotate_head(p, static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride,
                            static_cast<T*>(p.q_out) + token * p.q_out_token_stride + head * p.q_out_head_stride,
                            cos_sin);
            }
            for (int64_t head = 0; head < p.num_kv_heads; ++head) {
                rotate_head(p, static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride,
                            static_cast<T*>(p.k_out) + token * p.k_out_token_stride + head * p.k_out_head_stride,
                            cos_sin);
            }
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(rope_cpu, RopeParams)
