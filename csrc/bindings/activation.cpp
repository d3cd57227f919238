#include "fastkernels/activation.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

GatedParams gated_params(const char* op, const Tensor& x, const Tensor& y, bool is_quantized = false) {
    check(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == 2 * y.size(1), op,
          ": x must be [num_tokens, 2 * size] and out [num_tokens, size]");
    GatedParams p{};
    p.x = in(x);
    p.out = out(y);
    p.num_tokens = y.size(0);
    p.size = y.size(1);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.dtype = dtype_of(x, "x");
    check(is_quantized || dtype_of(y, "out") == p.dtype, op, ": out must have the dtype of x");
    return p;
}

void silu_mul(Tensor x, Tensor y) {
    const GatedParams p = gated_params("silu_mul", x, y);
    FK_LAUNCH(silu_mul, x, p);
}

void gelu_mul(Tensor x, bool approximate_tanh, Tensor y) {
    GatedParams p = gated_params("gelu_mul", x, y);
    p.approximate_tanh = approximate_tanh;
    FK_LAUNCH(gelu_mul, x, p);
}

void silu_mul_quant(Tensor x, int64_t kind, Tensor y, Tensor scales) {
    GatedParams p = gated_params("silu_mul_quant", x, y, true);
    p.bytes = byte_scales("silu_mul_quant", y, kind, scales);
    FK_LAUNCH(silu_mul_quant, x, p);
}

void gelu_mul_quant(Tensor x, bool approximate_tanh, int64_t kind, Tensor y, Tensor scales) {
    GatedParams p = gated_params("gelu_mul_quant", x, y, true);
    p.approximate_tanh = approximate_tanh;
    p.bytes = byte_scales("gelu_mul_quant", y, kind, scales);
    FK_LAUNCH(gelu_mul_quant, x, p);
}

void register_activation(torch::stable::detail::StableLibrary& m) {
    m.impl("silu_mul", TORCH_BOX(&silu_mul));
    m.impl("gelu_mul", TORCH_BOX(&gelu_mul));
    m.impl("silu_mul_quant", TORCH_BOX(&silu_mul_quant));
    m.impl("gelu_mul_quant", TORCH_BOX(&gelu_mul_quant));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("silu_mul(Tensor x, Tensor(a!) out) -> ()");
    m.def("gelu_mul(Tensor x, bool approximate_tanh, Tensor(a!) out) -> ()");
    m.def("silu_mul_quant(Tensor x, int kind, Tensor(a!) out, Tensor(b!) scales) -> ()");
    m.def("gelu_mul_quant(Tensor x, bool approximate_tanh, int kind, Tensor(a!) out, Tensor(b!) scales) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_activation)
