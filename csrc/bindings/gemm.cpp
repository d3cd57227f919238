#include "fastkernels/gemm.h"

#include <optional>

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool constant_weight, Tensor y) {
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == y.size(0) &&
              weight.size(0) == y.size(1),
          "linear: x must be [num_tokens, in_size], weight [out_size, in_size] and out [num_tokens, out_size]");
    check(x.size(0) <= kLinearMaxTokens, "linear: num_tokens is ", x.size(0), ", but the op takes at most ",
          kLinearMaxTokens);
    LinearParams p{};
    p.x = in(x);
    p.weight = in(weight);
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = weight.size(0);
    p.x_token_stride = x.stride(0);
    p.weight_row_stride = weight.stride(0);
    p.out_token_stride = y.stride(0);
    p.constant_weight = constant_weight;
    p.dtype = dtype_of(x, "x");
    check(dtype_of(weight, "weight") == p.dtype && dtype_of(y, "out") == p.dtype &&
              (!bias || dtype_of(*bias, "bias") == p.dtype),
          "linear: weight, bias and out must have the dtype of x");
    FK_LAUNCH(linear, x, p);
}

void register_gemm(torch::stable::detail::StableLibrary& m) {
    m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool constant_weight, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_gemm)
