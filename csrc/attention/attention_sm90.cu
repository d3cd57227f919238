// The launcher of attention_sm90: one block an SM; and the tensor maps of q, k and v, for attention_fp8_sm90 too.
#include <bit>

#include "attention/attention_sm90.h"
#include "attention/attention_sm90_args.h"
#include "common/dtype.cuh"
#include "common/hopper.cuh"
#include "common/ptx/tma.cuh"

namespace fastkernels {
namespace {

// [rows, heads, head_dim] in boxes of [box_rows, box_heads, 128 bytes]; strides in elements.
CUtensorMap tensor_map(const void* address, Sm90Element element, int head_dim, int64_t heads, int64_t rows,
                       int64_t head_stride, int64_t row_stride, int box_heads, int box_rows) {
    // A stride that is never used may be anything; the driver wants a multiple of 16 bytes all the same.
    return encode(
        {.address = address,
         .type = element.type,
         .extents = {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(rows)},
         .strides_bytes = {static_cast<uint64_t>(heads > 1 ? head_stride : head_dim) * element.bytes,
                           static_cast<uint64_t>(rows > 1 ? row_stride : head_dim * heads) * element.bytes},
         .box = {128 / element.bytes, static_cast<uint32_t>(box_heads), static_cast<uint32_t>(box_rows)}});
}

template <typename T, bool kBytes>
void launch_head(const Sm90Args& args, int num_blocks, void* stream) {
    switch (args.a.p.head_dim) {
        case 64: return attention_sm90_head<T, 64, kBytes>(args, num_blocks, stream);
        case 96: return attention_sm90_head<T, 96, kBytes>(args, num_blocks, stream);
        case 128: return attention_sm90_head<T, 128, kBytes>(args, num_blocks, stream);
        case 256: return attention_sm90_head<T, 256, kBytes>(args, num_blocks, stream);
        default: fail("attention_sm90 takes head_dim 64, 96, 128 and 256, got ", args.a.p.head_dim);
    }
}

}  // namespace

bool prefill_on_sm90(int64_t num_tokens, int head_dim, int group, DType dtype) {
    const bool has_shape = head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
    return has_shape && (dtype == DType::bf16 || dtype == DType::f16) && num_tokens > kSmallStepTokens &&
           prefill_rows_sm90(head_dim, group) >= 64 && on_hopper();
}

Sm90Args sm90_args(const AttentionMmaArgs& a, Sm90Element q, Sm90Element keys, int block_keys) {
    const AttentionParams& p = a.p;
    const bool paged = p.page_size > 0;
    const int box_keys = paged && p.page_size < block_keys ? p.page_size : block_keys;
    const int tile_tokens = prefill_rows_sm90(p.head_dim, a.group) / a.group;
    // Pages: every row of head_dim elements, of K and V and all heads, is a row of the map.
    const int64_t rows = paged ? p.num_keys * a.page_rows : p.num_keys;
    check(rows < int64_t{1} << 31, "attention takes caches of fewer than 2^31 rows of head_dim elements, got ", rows);
    const int64_t v_rows = paged ? rows - a.page_rows / 2 : rows;
    const int kv_heads = paged ? 1 : p.num_kv_heads;
    const CUtensorMap q_map = tensor_map(p.q, q, p.head_dim, p.num_q_heads, p.num_tokens, p.q_head_stride,
                                         p.q_token_stride, a.group, tile_tokens);
    const auto keys_map = [&](const void* address, int64_t key_rows, int64_t head_stride, int64_t token_stride) {
        return key_rows == 0
                   ? q_map  // never loaded from; the driver refuses a tensor without rows
                   : tensor_map(address, keys, p.head_dim, kv_heads, key_rows, head_stride, token_stride, 1, box_keys);
    };
    return {
        .q_map = q_map,
        .k_map = keys_map(p.k, rows, p.k_head_stride, p.k_token_stride),
        .v_map = keys_map(p.v, v_rows, p.v_head_stride, p.v_token_stride),
        .a = a,
        .item_offset = a.prefill_item_offset,
        .tile_tokens = tile_tokens,
        .inverse_group = 1.0f / static_cast<float>(a.group),
        .box_shift = std::countr_zero(static_cast<uint32_t>(box_keys)),
    };
}

void attention_sm90(const AttentionMmaArgs& a, void* stream) {
    const bool is_bf16 = a.p.dtype == DType::bf16, is_bytes = size_bytes(a.p.kv_dtype) == 1;
    const int block_keys = sm90_block_keys(a.p.head_dim, is_bytes), sms = num_sms();
    const Sm90Element element{is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2};
    const Sm90Args args =
        sm90_args(a, element, is_bytes ? Sm90Element{CU_TENSOR_MAP_DATA_TYPE_UINT8, 1} : element, block_keys);
    if (is_bytes) {
        is_bf16 ? launch_head<bf16, true>(args, sms, stream) : launch_head<fp16, true>(args, sms, stream);
    } else {
        is_bf16 ? launch_head<bf16, false>(args, sms, stream) : launch_head<fp16, false>(args, sms, stream);
    }
}

}  // namespace fastkernels
