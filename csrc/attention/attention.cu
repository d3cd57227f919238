// The launcher of attention: checks, brings pages and contiguous keys to one form, and chooses the kernels:
//   attention_mma.cuh    bf16 and fp16, head_dim 64, 80, 96, 128, 256, 16-byte aligned
//   attention_sm90.cuh   the prefill tiles among those, on Hopper and in steps of some size
//   attention_plain.cu   all else up to head_dim 256
//
// Where both tensor-core kernels run a step, they run side by side. The second is launched as a programmatic dependent
// of the first and does not wait for it: it reads what kernels before the first wrote, and each block of the first
// waits for those before it lets dependents start. It does wait at the end, in one block, so that whoever waits for the
// second has waited for both.
#include <bit>

#include "attention/attention_mma.h"
#include "attention/attention_sm90.h"
#include "common/dtype.cuh"
#include "common/launch.h"

namespace fastkernels {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

bool fits_tensor_cores(const AttentionParams& p) {
    const auto addresses = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                           reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.out);
    const auto strides = p.q_token_stride | p.q_head_stride | p.k_token_stride | p.k_head_stride | p.v_token_stride |
                         p.v_head_stride | p.out_token_stride | p.out_head_stride;
    return (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.scale > 0.0f && addresses % 16 == 0 &&
           strides % 8 == 0;
}

AttentionMmaArgs attention_args(const AttentionParams& p) {
    AttentionMmaArgs a{};
    a.p = p;
    a.group = p.num_q_heads / p.num_kv_heads;
    if (p.page_size > 0) {
        a.page_shift = std::countr_zero(static_cast<uint32_t>(p.page_size));
        a.page_rows = 2u * p.num_kv_heads * p.page_size;
        const int64_t keys_bytes =
            static_cast<int64_t>(p.num_kv_heads) * p.page_size * p.head_dim * static_cast<int64_t>(size_bytes(p.dtype));
        a.p.v = static_cast<const char*>(p.k) + keys_bytes;
        a.p.k_token_stride = a.p.v_token_stride = p.head_dim;
        a.p.k_head_stride = a.p.v_head_stride = static_cast<int64_t>(p.page_size) * p.head_dim;
        a.p.causal = true;
    }
    a.exponent = kLog2e * (p.soft_cap > 0.0f ? p.soft_cap : p.scale);
    a.tanh_exponent = p.soft_cap > 0.0f ? 2.0f * kLog2e * p.scale / p.soft_cap : 0.0f;
    return a;
}

template <typename T>
bool launch_mma(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    switch (a.p.head_dim) {
        case 64: attention_mma<T, 64>(a, grid, stream); return true;
        case 80: attention_mma<T, 80>(a, grid, stream); return true;
        case 96: attention_mma<T, 96>(a, grid, stream); return true;
        case 128: attention_mma<T, 128>(a, grid, stream); return true;
        case 256: attention_mma<T, 256>(a, grid, stream); return true;
        default: return false;
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
        const int sms = num_sms();
        a.item_offset = work_map_item_offset(p.num_kv_heads, sms);
        // Prefill first, on as many SMs as the plan gives it; the decodes fill the others, and all in the end.
        a.beside_prefill = prefill_on_sm90(p.num_tokens, p.head_dim, a.group, p.dtype);
        if (a.beside_prefill) {
            attention_sm90(a, stream);
        }
        const int64_t items = max_items(p.num_tokens, p.num_seqs, a.group, p.num_kv_heads, sms);
        const dim3 grid(static_cast<unsigned>(items), static_cast<unsigned>(p.num_kv_heads));
        if (p.dtype == DType::bf16 ? launch_mma<bf16>(a, grid, stream) : launch_mma<fp16>(a, grid, stream)) {
            return;
        }
    }
    attention_plain_cuda(a, stream);
}

}  // namespace fastkernels
