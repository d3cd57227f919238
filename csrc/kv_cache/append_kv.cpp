// kv_cache[page, 0 | 1, head, offset] = k | v[token, head], with slot_mapping[token] = page * page_size + offset.
// A task owns one token.
#include <cstring>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/kv_cache.h"

namespace fastkernels::cpu::FK_ISA {

namespace {

template <typename T, typename Byte>
void append_bytes(const AppendKvParams& p) {
    parallel_for(p.num_tokens, 1 + 16384 / (int64_t{p.head_dim} * p.num_kv_heads + 1), [&](int64_t token) {
        const int64_t slot = p.slot_mapping[token];
        if (slot < 0 || slot >= p.num_pages * p.page_size) {
            return;
        }
        for (int64_t head = 0; head < p.num_kv_heads; ++head) {
            for (int kv = 0; kv < 2; ++kv) {
                const T* from = kv == 0
                                    ? static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride
                                    : static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride;
                const float* scales = kv == 0 ? p.k_scale : p.v_scale;
                const float scale = scales != nullptr ? scales[head] : 1.0f;
                Byte* to = static_cast<Byte*>(p.kv_cache) +
                           kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
                for (int32_t i = 0; i < p.head_dim; ++i) {
                    to[i] = from_float<Byte>(to_float(from[i]) / scale);
                }
            }
        }
    });
}

}  // namespace

void append_kv_cpu(const AppendKvParams& p) {
    if (p.kv_dtype != p.dtype) {
        visit_float(p.dtype,
                    [&]<typename T>() { visit_byte(p.kv_dtype, [&]<typename Byte>() { append_bytes<T, Byte>(p); }); });
        return;
    }
    const auto bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t row_bytes = p.head_dim * bytes;
    const char *k = static_cast<const char*>(p.k), *v = static_cast<const char*>(p.v);
    char* cache = static_cast<char*>(p.kv_cache);
    parallel_for(p.num_tokens, 1 + 65536 / (row_bytes * p.num_kv_heads + 1), [&](int64_t token) {
        const int64_t slot = p.slot_mapping[token];
        if (slot < 0 || slot >= p.num_pages * p.page_size) {
            return;
        }
        for (int64_t head = 0; head < p.num_kv_heads; ++head) {
            const auto to = [&](int kv) {
                return cache + bytes * kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
            };
            std::memcpy(to(0), k + bytes * (token * p.k_token_stride + head * p.k_head_stride), row_bytes);
            std::memcpy(to(1), v + bytes * (token * p.v_token_stride + head * p.v_head_stride), row_bytes);
        }
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(append_kv_cpu, AppendKvParams)
