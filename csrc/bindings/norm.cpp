#include "fastkernels/norm.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void rms_norm(Tensor x, Tensor weight, double eps, Tensor y) {
    const bool heads = x.dim() == 3;
    check(x.dim() == y.dim() && (heads || x.dim() == 2), "rms_norm: x and out must both have 2 or 3 dimensions");
    const int64_t last = x.dim() - 1;
    RmsNormParams p{};
    p.x = in(x);
    p.weight = in(weight);
    p.out = out(y);
    p.num_tokens = x.size(0);
    p.num_heads = heads ? x.size(1) : 1;
    p.size = x.size(last);
    p.x_token_stride = x.stride(0);
    p.x_head_stride = heads ? x.stride(1) : 0;
    p.out_token_stride = y.stride(0);
    p.out_head_stride = heads ? y.stride(1) : 0;
    p.eps = static_cast<float>(eps);
    p.dtype = dtype_of(x, "x");
    check(weight.numel() == p.size && y.numel() == x.numel(), "rms_norm: weight or out does not fit x");
    FK_LAUNCH(rms_norm, x, p);
}

void register_norm(torch::stable::detail::StableLibrary& m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_norm)
