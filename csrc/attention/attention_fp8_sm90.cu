// The launcher of attention_fp8_sm90: the tensor maps of q, k and v, one block an SM.
#include <bit>

#include "attention/attention_fp8_sm90.cuh"
#include "common/dtype.cuh"

namespace fastkernels {
namespace {

// [rows, heads, 128] bytes in boxes of [box_rows, box_heads, 128].
CUtensorMap byte_map(const void* address, int64_t heads, int64_t rows, int64_t head_stride, int64_t row_stride,
                     int box_heads, int box_rows) {
    constexpr uint64_t kHeadDim = Fp8Shape::kHeadDim;
    // A stride that is never used may be anything; the driver wants a multiple of 16 bytes all the same.
    return encode({.address = address,
                   .type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                   .extents = {kHeadDim, static_cast<uint64_t>(heads), static_cast<uint64_t>(rows)},
                   .strides_bytes = {heads > 1 ? static_cast<uint64_t>(head_stride) : kHeadDim,
                                     rows > 1 ? static_cast<uint64_t>(row_stride) : kHeadDim * heads},
                   .box = {kHeadDim, static_cast<uint32_t>(box_heads), static_cast<uint32_t>(box_rows)}});
}

template <typename T>
void launch_fp8(const Sm90Args& args, void* stream) {
    launch(args.a.p.soft_cap > 0.0f ? attention_fp8_sm90_kernel<T, true> : attention_fp8_sm90_kernel<T, false>,
           {.grid = dim3(num_sms()), .block = dim3(Fp8Shape::kThreads), .shared_bytes = sizeof(Fp8Shared), .pdl = true},
           stream, args);
}

}  // namespace

void attention_fp8_sm90(const AttentionMmaArgs& a, void* stream) {
    const AttentionParams& p = a.p;
    const bool paged = p.page_size > 0;
    const int box_keys = paged && p.page_size < 64 ? p.page_size : 64;
    const int tile_tokens = prefill_rows_sm90(p.head_dim, a.group) / a.group;
    // Pages: every row of head_dim elements, of K and V and all heads, is a row of the map.
    const int64_t rows = paged ? p.num_keys * a.page_rows : p.num_keys;
    check(rows < int64_t{1} << 31, "attention takes caches of fewer than 2^31 rows of head_dim elements, got ", rows);
    const int64_t v_rows = paged ? rows - a.page_rows / 2 : rows;
    const int kv_heads = paged ? 1 : p.num_kv_heads;
    const CUtensorMap q_map =
        byte_map(p.q, p.num_q_heads, p.num_tokens, p.q_head_stride, p.q_token_stride, a.group, tile_tokens);
    const auto keys_map = [&](const void* keys, int64_t key_rows, int64_t head_stride, int64_t token_stride) {
        return key_rows == 0 ? q_map  // never loaded from; the driver refuses a tensor without rows
                             : byte_map(keys, kv_heads, key_rows, head_stride, token_stride, 1, box_keys);
    };
    const Sm90Args args{
        .q_map = q_map,
        .k_map = keys_map(p.k, rows, p.k_head_stride, p.k_token_stride),
        .v_map = keys_map(p.v, v_rows, p.v_head_stride, p.v_token_stride),
        .a = a,
        .item_offset = a.prefill_item_offset,
        .tile_tokens = tile_tokens,
        .inverse_group = 1.0f / static_cast<float>(a.group),
        .box_shift = std::countr_zero(static_cast<uint32_t>(box_keys)),
    };
    p.dtype == DType::bf16 ? launch_fp8<bf16>(args, stream) : launch_fp8<fp16>(args, stream);
}

}  // namespace fastkernels
