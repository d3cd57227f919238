#include "fastkernels/embedding.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void gather(const char* op, const Tensor& rows, const Tensor& indices, const Tensor& y) {
    check(rows.dim() == 2 && indices.dim() == 1 && y.dim() == 2, op,
          ": the rows and out must have 2 dimensions, the indices 1");
    GatherRowsParams p{};
    p.rows = in(rows);
    p.indices = in(indices);
    p.out = out(y);
    p.num_rows = rows.size(0);
    p.num_indices = indices.size(0);
    p.row_size = rows.size(1);
    p.row_stride = rows.stride(0);
    p.out_stride = y.stride(0);
    p.dtype = dtype_of(rows, "the rows");
    p.index_dtype = dtype_of(indices, "the indices");
    check(y.size(0) == p.num_indices && y.size(1) == p.row_size, op, ": out must be [number of indices, row size]");
    check(dtype_of(y, "out") == p.dtype, op, ": out must have the dtype of the rows");
    check(indices.is_contiguous(), op, ": the indices must be contiguous");
    FK_LAUNCH(gather_rows, rows, p);
}

void embedding(Tensor token_ids, Tensor table, Tensor y) {
    gather("embedding", table, token_ids, y);
}

void gather_rows(Tensor x, Tensor row_indices, Tensor y) {
    gather("gather_rows", x, row_indices, y);
}

void resolve_token_ids(Tensor token_ids, Tensor sampled, Tensor resolved) {
    check(dtype_of(token_ids, "token_ids") == DType::i32 && dtype_of(sampled, "sampled") == DType::i32 &&
              dtype_of(resolved, "out") == DType::i32,
          "resolve_token_ids: all tensors must be int32");
    check(token_ids.is_contiguous() && sampled.is_contiguous() && resolved.is_contiguous() &&
              resolved.numel() == token_ids.numel(),
          "resolve_token_ids: all tensors must be contiguous, and out of the size of token_ids");
    ResolveTokenIdsParams p{};
    p.token_ids = static_cast<const int32_t*>(in(token_ids));
    p.sampled = static_cast<const int32_t*>(in(sampled));
    p.out = static_cast<int32_t*>(out(resolved));
    p.num_tokens = token_ids.numel();
    p.num_sampled = sampled.numel();
    FK_LAUNCH(resolve_token_ids, token_ids, p);
}

void register_embedding(torch::stable::detail::StableLibrary& m) {
    m.impl("embedding", TORCH_BOX(&embedding));
    m.impl("gather_rows", TORCH_BOX(&gather_rows));
    m.impl("resolve_token_ids", TORCH_BOX(&resolve_token_ids));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("embedding(Tensor token_ids, Tensor table, Tensor(a!) out) -> ()");
    m.def("gather_rows(Tensor x, Tensor row_indices, Tensor(a!) out) -> ()");
    m.def("resolve_token_ids(Tensor token_ids, Tensor sampled, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_embedding)
