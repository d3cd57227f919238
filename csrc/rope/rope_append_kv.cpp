// q turned by the angles of its positions into q_out, k turned and v as it is into their pages. A task owns one token.
// Source: Su et al. 2021; the cache: fastkernels/kv_cache.h.
#include "fastkernels/kv_cache.h"
#include "rope/rotate.h"

namespace fastkernels::cpu::FK_ISA {

void rope_append_kv_cpu(const RopeParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens, rope_grain(p), [&](int64_t token) {
            const float* cos_sin = cos_sin_row(p, token);
            for (int64_t head = 0; head < p.num_q_heads; ++head) {
                rotate_head(p, static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride,
                            static_cast<T*>(p.q_out) + token * p.q_out_token_stride + head * p.q_out_head_stride,
                            cos_sin);
            }
            const int64_t slot = p.slot_mapping[token];
            if (slot < 0 || slot >= p.num_pages * p.page_size) {
                return;
            }
            for (int64_t head = 0; head < p.num_kv_heads; ++head) {
                const auto to = [&](int kv) {
                    return static_cast<T*>(p.kv_cache) +
                           kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
                };
                rotate_head(p, static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride, to(0),
                            cos_sin);
                std::memcpy(to(1), static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride,
                            p.head_dim * sizeof(T));
            }
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(rope_append_kv_cpu, RopeParams)
