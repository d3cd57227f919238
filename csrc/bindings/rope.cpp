#include "fastkernels/rope.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

// What both ops have: q, k, positions, cos_sin and q_out.
RopeParams rope_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin,
                       bool interleaved, const Tensor& q_out) {
    check(q.dim() == 3 && k.dim() == 3 && cos_sin.dim() == 2 && q_out.dim() == 3, op,
          ": q, k and q_out must have 3 dimensions, cos_sin 2");
    RopeParams p{};
    p.q = in(q);
    p.k = in(k);
    p.q_out = out(q_out);
    p.positions = in(positions);
    p.num_tokens = q.size(0);
    p.max_position = cos_sin.size(0);
    p.q_token_stride = q.stride(0);
    p.q_head_stride = q.stride(1);
    p.k_token_stride = k.stride(0);
    p.k_head_stride = k.stride(1);
    p.q_out_token_stride = q_out.stride(0);
    p.q_out_head_stride = q_out.stride(1);
    p.num_q_heads = static_cast<int32_t>(q.size(1));
    p.num_kv_heads = static_cast<int32_t>(k.size(1));
    p.head_dim = static_cast<int32_t>(q.size(2));
    p.rotary_dim = static_cast<int32_t>(cos_sin.size(1));
    p.interleaved = interleaved;
    p.dtype = dtype_of(q, "q");
    p.position_dtype = dtype_of(positions, "positions");
    check(k.size(0) == p.num_tokens && k.size(2) == p.head_dim, op, ": k must be [num_tokens, num_kv_heads, head_dim]");
    check(q_out.size(0) == p.num_tokens && q_out.size(1) == p.num_q_heads && q_out.size(2) == p.head_dim, op,
          ": q_out must be like q");
    check(dtype_of(k, "k") == p.dtype && dtype_of(q_out, "q_out") == p.dtype, op,
          ": k and q_out must have the dtype of q");
    check((p.position_dtype == DType::i32 || p.position_dtype == DType::i64) && positions.numel() == p.num_tokens &&
              positions.is_contiguous(),
          op, ": positions must be contiguous int32 or int64 [num_tokens]");
    check(dtype_of(cos_sin, "cos_sin") == DType::f32 && cos_sin.is_contiguous() && p.max_position > 0 &&
              p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim,
          op, ": cos_sin must be contiguous fp32 [max_position, rotary_dim], rotary_dim even and at most head_dim");
    p.cos_sin = static_cast<const float*>(in(cos_sin));
    return p;
}

void rope(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, bool interleaved, Tensor q_out, Tensor k_out) {
    RopeParams p = rope_params("rope", q, k, positions, cos_sin, interleaved, q_out);
    check(k_out.dim() == 3 && k_out.size(0) == k.size(0) && k_out.size(1) == k.size(1) && k_out.size(2) == k.size(2) &&
              dtype_of(k_out, "k_out") == p.dtype,
          "rope: k_out must be like k");
    p.k_out = out(k_out);
    p.k_out_token_stride = k_out.stride(0);
    p.k_out_head_stride = k_out.stride(1);
    FK_LAUNCH(rope, q, p);
}

void rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, bool interleaved, Tensor kv_cache,
                    Tensor slot_mapping, Tensor q_out, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                    std::optional<Tensor> k_offset) {
    RopeParams p = rope_params("rope_append_kv", q, k, positions, cos_sin, interleaved, q_out);
    check(v.dim() == 3 && v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2) &&
              dtype_of(v, "v") == p.dtype,
          "rope_append_kv: v must be like k");
    check(kv_cache.dim() == 5 && kv_cache.size(1) == 2 && kv_cache.size(2) == p.num_kv_heads &&
              kv_cache.size(4) == p.head_dim && kv_cache.is_contiguous(),
          "rope_append_kv: kv_cache must be contiguous [num_pages, 2, num_kv_heads, page_size, head_dim]");
    p.kv_dtype = dtype_of(kv_cache, "kv_cache");
    check(p.kv_dtype == p.dtype || size_bytes(p.kv_dtype) == 1,
          "rope_append_kv: kv_cache must have the dtype of q, or e4m3, e5m2 or int8");
    p.k_scale = scales_of("rope_append_kv", "k_scale", k_scale, p.num_kv_heads);
    p.v_scale = scales_of("rope_append_kv", "v_scale", v_scale, p.num_kv_heads);
    if (k_offset) {
        check(dtype_of(*k_offset, "k_offset") == DType::f32 && k_offset->dim() == 2 &&
                  k_offset->size(0) == p.num_kv_heads && k_offset->size(1) == p.head_dim && k_offset->is_contiguous() &&
                  size_bytes(p.kv_dtype) == 1,
              "rope_append_kv: k_offset must be contiguous fp32 [num_kv_heads, head_dim], and kv_cache of bytes");
        p.k_offset = static_cast<const float*>(in(*k_offset));
    }
    check(dtype_of(slot_mapping, "slot_mapping") == DType::i64 && slot_mapping.numel() == p.num_tokens &&
              slot_mapping.is_contiguous(),
          "rope_append_kv: slot_mapping must be contiguous int64 [num_tokens]");
    p.v = in(v);
    p.v_token_stride = v.stride(0);
    p.v_head_stride = v.stride(1);
    p.kv_cache = out(kv_cache);
    p.num_pages = kv_cache.size(0);
    p.page_size = static_cast<int32_t>(kv_cache.size(3));
    p.slot_mapping = static_cast<const int64_t*>(in(slot_mapping));
    FK_LAUNCH(rope_append_kv, q, p);
}

void register_rope(torch::stable::detail::StableLibrary& m) {
    m.impl("rope", TORCH_BOX(&rope));
    m.impl("rope_append_kv", TORCH_BOX(&rope_append_kv));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def(
        "rope(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, bool interleaved, Tensor(a!) q_out, "
        "Tensor(b!) k_out) -> ()");
    m.def(
        "rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, bool interleaved, "
        "Tensor(a!) kv_cache, Tensor slot_mapping, Tensor(b!) q_out, Tensor? k_scale=None, Tensor? v_scale=None, "
        "Tensor? k_offset=None) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_rope)
