#include "fastkernels/norm.h"

#include <optional>

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

// What every norm has: x, weight and out, in two dimensions or three.
NormParams norm_params(const char* op, const Tensor& x, const Tensor& weight, double eps, const Tensor& y,
                       bool is_quantized = false) {
    const bool heads = x.dim() == 3;
    check(x.dim() == y.dim() && (heads || x.dim() == 2), op, ": x and out must both have 2 or 3 dimensions");
    NormParams p{};
    p.x = in(x);
    p.weight = in(weight);
    p.out = out(y);
    p.num_tokens = x.size(0);
    p.num_heads = heads ? x.size(1) : 1;
    p.size = x.size(x.dim() - 1);
    p.x_token_stride = x.stride(0);
    p.x_head_stride = heads ? x.stride(1) : 0;
    p.out_token_stride = y.stride(0);
    p.out_head_stride = heads ? y.stride(1) : 0;
    p.eps = static_cast<float>(eps);
    p.dtype = dtype_of(x, "x");
    check(weight.numel() == p.size && y.numel() == x.numel(), op, ": weight or out does not fit x");
    check(dtype_of(weight, "weight") == p.dtype && (is_quantized || dtype_of(y, "out") == p.dtype), op,
          ": weight and out must have the dtype of x");
    return p;
}

void rms_norm(Tensor x, Tensor weight, double eps, Tensor y) {
    const NormParams p = norm_params("rms_norm", x, weight, eps, y);
    FK_LAUNCH(rms_norm, x, p);
}

void set_residual(const char* op, NormParams& p, const Tensor& x, Tensor& residual) {
    check(residual.dim() == x.dim() && residual.numel() == x.numel() && dtype_of(residual, "residual") == p.dtype, op,
          ": residual must be like x");
    p.residual = out(residual);
    p.residual_token_stride = residual.stride(0);
    p.residual_head_stride = x.dim() == 3 ? residual.stride(1) : 0;
}

void add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps, Tensor y) {
    NormParams p = norm_params("add_rms_norm", x, weight, eps, y);
    set_residual("add_rms_norm", p, x, residual);
    FK_LAUNCH(add_rms_norm, x, p);
}

void layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, Tensor y) {
    NormParams p = norm_params("layer_norm", x, weight, eps, y);
    if (bias.has_value()) {
        check(bias->numel() == p.size && dtype_of(*bias, "bias") == p.dtype, "layer_norm: bias does not fit x");
        p.bias = in(*bias);
    }
    FK_LAUNCH(layer_norm, x, p);
}

void rms_norm_quant(Tensor x, Tensor weight, double eps, int64_t kind, Tensor y, Tensor scales) {
    NormParams p = norm_params("rms_norm_quant", x, weight, eps, y, true);
    p.bytes = byte_scales("rms_norm_quant", y, kind, scales);
    FK_LAUNCH(rms_norm_quant, x, p);
}

void add_rms_norm_quant(Tensor x, Tensor residual, Tensor weight, double eps, int64_t kind, Tensor y, Tensor scales) {
    NormParams p = norm_params("add_rms_norm_quant", x, weight, eps, y, true);
    set_residual("add_rms_norm_quant", p, x, residual);
    p.bytes = byte_scales("add_rms_norm_quant", y, kind, scales);
    FK_LAUNCH(add_rms_norm_quant, x, p);
}

void register_norm(torch::stable::detail::StableLibrary& m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("rms_norm_quant", TORCH_BOX(&rms_norm_quant));
    m.impl("add_rms_norm_quant", TORCH_BOX(&add_rms_norm_quant));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
    m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out) -> ()");
    m.def("rms_norm_quant(Tensor x, Tensor weight, float eps, int kind, Tensor(a!) out, Tensor(b!) scales) -> ()");
    m.def(
        "add_rms_norm_quant(Tensor x, Tensor(a!) residual, Tensor weight, float eps, int kind, Tensor(b!) out, "
        "Tensor(c!) scales) -> ()");
    m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_norm)
