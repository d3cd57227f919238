// The launcher of attention: checks, brings pages and contiguous keys to one form, and chooses the kernels:
//   attention_decode.cuh   the decode tiles: bf16 and fp16, head_dim 64, 80, 96, 128, 256, 16-byte aligned
//   attention_sm90.cuh     the prefill tiles among those, on Hopper and in steps of some size
//   attention_fp8_sm90.cuh those of e4m3 queries and keys, likewise
//   attention_mma.cuh      the prefill tiles elsewhere
//   attention_plain.cu     all else up to head_dim 256
//
// The decode and the prefill kernel of a step run side by side. The second is launched as a programmatic dependent of
// the first and does not wait for it: it reads what kernels before the first wrote, and each block of the first waits
// for those before it lets dependents start. It does wait at the end, in one block, so that whoever waits for the
// second has waited for both.
#include <algorithm>
#include <bit>

#include "attention/attention_decode.h"
#include "attention/attention_fp8_sm90.h"
#include "attention/attention_mma.h"
#include "attention/attention_sm90.h"
#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/ptx/byte_types.cuh"

namespace fastkernels {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

bool fits_tensor_cores(const AttentionParams& p) {
    const auto addresses = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                           reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.out);
    const auto strides_bytes = (p.q_token_stride | p.q_head_stride) * static_cast<int64_t>(size_bytes(p.q_dtype)) |
                               (p.k_token_stride | p.k_head_stride | p.v_token_stride | p.v_head_stride) *
                                   static_cast<int64_t>(size_bytes(p.kv_dtype)) |
                               (p.out_token_stride | p.out_head_stride) * 2;
    const bool has_kernel =
        p.head_dim == 64 || p.head_dim == 80 || p.head_dim == 96 || p.head_dim == 128 || p.head_dim == 256;
    return has_kernel && (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.scale > 0.0f && addresses % 16 == 0 &&
           strides_bytes % 16 == 0;
}

AttentionMmaArgs attention_args(const AttentionParams& p) {
    AttentionMmaArgs a{};
    a.p = p;
    a.group = p.num_q_heads / p.num_kv_heads;
    a.per_group = (1u << 24) / a.group + 1;
    if (p.page_size > 0) {
        a.page_shift = std::countr_zero(static_cast<uint32_t>(p.page_size));
        a.page_rows = 2u * p.num_kv_heads * p.page_size;
        const int64_t keys_bytes = static_cast<int64_t>(p.num_kv_heads) * p.page_size * p.head_dim *
                                   static_cast<int64_t>(size_bytes(p.kv_dtype));
        a.p.v = static_cast<const char*>(p.k) + keys_bytes;
        a.p.k_token_stride = a.p.v_token_stride = p.head_dim;
        a.p.k_head_stride = a.p.v_head_stride = static_cast<int64_t>(p.page_size) * p.head_dim;
        a.p.causal = true;
    }
    a.exponent = kLog2e * (p.soft_cap > 0.0f ? p.soft_cap : p.scale);
    a.tanh_exponent = p.soft_cap > 0.0f ? 2.0f * kLog2e * p.scale / p.soft_cap : 0.0f;
    return a;
}

// body.operator()<D>() for the head_dim of the call.
template <typename F>
void visit_head_dim(int32_t head_dim, F&& body) {
    switch (head_dim) {
        case 64: return body.template operator()<64>();
        case 80: return body.template operator()<80>();
        case 96: return body.template operator()<96>();
        case 128: return body.template operator()<128>();
        case 256: return body.template operator()<256>();
        default: fail("head_dim ", head_dim, " is not supported: 64, 80, 96, 128 and 256 are");
    }
}

// body.operator()<KV>() for the dtype of the keys.
template <typename F>
void visit_keys(DType dtype, F&& body) {
    switch (dtype) {
        case DType::bf16: return body.template operator()<bf16>();
        case DType::f16: return body.template operator()<fp16>();
        default: return visit_byte(dtype, body);
    }
}

// Packed rows of the longest sequence of queries there may be.
int64_t most_rows(const AttentionMmaArgs& a) {
    const int64_t tokens =
        a.p.max_query_len > 0 ? std::min<int64_t>(a.p.max_query_len, a.p.num_tokens) : a.p.num_tokens;
    return tokens * a.group;
}

void launch_decode(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    visit_keys(a.p.kv_dtype, [&]<typename KV>() {
        visit_head_dim(a.p.head_dim, [&]<int D>() {
            if constexpr (D <= 128) {
                if (decodes_in_large_blocks(a.p.num_tokens, a.group, D)) {
                    return attention_decode<KV, D, 1, 8>(a, grid, stream);
                }
                if (most_rows(a) > 8 && decode_rows(D, a.group) == 32) {
                    return attention_decode<KV, D, 4, 4>(a, grid, stream);
                }
            }
            if (most_rows(a) <= 8) {
                return attention_decode<KV, D, 1, 4>(a, grid, stream);
            }
            attention_decode<KV, D, 2, 4>(a, grid, stream);
        });
    });
}

void launch_rows(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    visit_keys(a.p.kv_dtype, [&]<typename KV>() {
        visit_head_dim(a.p.head_dim, [&]<int D>() { attention_rows<KV, D, (D <= 128 ? 4 : 1)>(a, grid, stream); });
    });
}

void launch_mma(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    visit_head_dim(a.p.head_dim, [&]<int D>() {
        if (a.p.dtype == DType::bf16) {
            attention_mma<bf16, D>(a, grid, stream);
        } else {
            attention_mma<fp16, D>(a, grid, stream);
        }
    });
}

void launch_tensor_cores(AttentionMmaArgs& a, void* stream) {
    const AttentionParams& p = a.p;
    const int sms = num_sms();
    a.item_offset = work_map_item_offset(p.num_kv_heads, sms);
    a.prefill_item_offset = work_map_prefill_item_offset(p.num_tokens, p.num_seqs, p.num_kv_heads, sms);
    a.num_sms = sms;
    const bool planned_for_sm90 = prefill_on_sm90(p.num_tokens, p.head_dim, a.group, p.dtype);
    a.prefill_rows = planned_for_sm90 ? prefill_rows_sm90(p.head_dim, a.group) : prefill_rows(p.head_dim);
    const bool plain_keys = p.kv_dtype == p.dtype, fp8 = takes_fp8_sm90(p);
    const bool prefill = most_rows(a) > decode_rows(p.head_dim, a.group);  // else no sequence has prefill tiles
    const bool sm90 = prefill && planned_for_sm90 && (p.q_dtype == p.dtype || fp8) && p.tree_mask == nullptr;
    // Prefill first, on as many SMs as the plan gives it; the decodes fill the others, and all in the end.
    a.beside_prefill = sm90;
    if (sm90) {
        fp8 ? attention_fp8_sm90(a, stream) : attention_sm90(a, stream);
    }
    // A tile makes less than one item more than its share; blocks without an item would wait for an SM all the same.
    const int64_t items = decodes_in_large_blocks(p.num_tokens, a.group, p.head_dim)
                              ? most_seqs(p.num_tokens, p.num_seqs) - 1 + large_block_items(p.num_kv_heads, sms)
                              : max_decode_items(p.num_tokens, p.num_seqs, p.num_kv_heads, sms);
    launch_decode(a, dim3(static_cast<unsigned>(items * p.num_kv_heads)), stream);
    if (prefill && !sm90) {
        const int64_t prefill_items = max_prefill_items(p.num_tokens, p.num_seqs, a.group, p.num_kv_heads, sms);
        const dim3 grid(static_cast<unsigned>(prefill_items), static_cast<unsigned>(p.num_kv_heads));
        if (plain_keys && !planned_for_sm90) {
            launch_mma(a, grid, stream);
        } else {
            launch_rows(a, grid, stream);
        }
    }
}

}  // namespace

void attention_cuda(const AttentionParams& p, void* stream) {
    if (p.num_tokens == 0 || p.num_seqs == 0) {
        return;
    }
    check(p.num_kv_heads > 0 && p.num_q_heads % p.num_kv_heads == 0,
          "num_q_heads must be a multiple of num_kv_heads, got ", p.num_q_heads, " and ", p.num_kv_heads);
    check(p.page_size == 0 || std::has_single_bit(static_cast<uint32_t>(p.page_size)),
          "page_size must be a power of two, got ", p.page_size);
    AttentionMmaArgs a = attention_args(p);
    if (fits_tensor_cores(a.p)) {
        check(p.work_map != nullptr && p.workspace != nullptr && reinterpret_cast<uintptr_t>(p.work_map) % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(p.workspace) % 16 == 0,
              "attention needs the work map of attention_plan and a workspace, aligned to 16 bytes");
        launch_tensor_cores(a, stream);
    } else {
        check(p.kv_dtype == p.dtype && p.tree_mask == nullptr,
              "attention with keys of one byte or a tree mask takes bf16 and fp16, a positive scale, head_dim 64, 80, "
              "96, 128 or 256 and addresses and strides in multiples of 16 bytes");
        attention_plain_cuda(a, stream);
    }
}

}  // namespace fastkernels
