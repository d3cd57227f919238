// q turned by the angles of its positions into q_out, k turned and v as it is into their pages. A task owns one token.
// Source: Su et al. 2021; the cache: fastkernels/kv_cache.h.
#include <vector>

#include "fastkernels/kv_cache.h"
#include "rope/rotate.h"

namespace fastkernels::cpu::FK_ISA {

namespace {

// k is rounded to T before it becomes bytes, as by rope and append_kv one after the other.
template <typename T, typename Byte>
void append_bytes(const RopeParams& p, int64_t token, int64_t slot, const float* cos_sin) {
    std::vector<T> turned(static_cast<size_t>(p.head_dim));
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        const auto write = [&](int kv, const T* from, const float* scales, const float* offset) {
            const float scale = scales != nullptr ? scales[head] : 1.0f;
            Byte* to = static_cast<Byte*>(p.kv_cache) +
                       kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
            for (int32_t i = 0; i < p.head_dim; ++i) {
                to[i] = from_float<Byte>((to_float(from[i]) - (offset != nullptr ? offset[i] : 0.0f)) / scale);
            }
        };
        rotate_head(p, static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride, turned.data(),
                    cos_sin);
        write(0, turned.data(), p.k_scale, p.k_offset != nullptr ? p.k_offset + head * p.head_dim : nullptr);
        write(1, static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride, p.v_scale, nullptr);
    }
}

}  // namespace

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
            if (p.kv_dtype != p.dtype) {
                visit_byte(p.kv_dtype, [&]<typename Byte>() { append_bytes<T, Byte>(p, token, slot, cos_sin); });
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
