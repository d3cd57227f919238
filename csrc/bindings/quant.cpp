#include "fastkernels/quant.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void quantize(Tensor x, int64_t kind, Tensor y, Tensor scales) {
    check(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1),
          "quantize: x and out must be [num_tokens, size]");
    QuantizeParams p{};
    p.x = in(x);
    p.out = out(y);
    p.bytes = byte_scales("quantize", y, kind, scales, true);
    p.num_tokens = x.size(0);
    p.size = x.size(1);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.dtype = dtype_of(x, "x");
    FK_LAUNCH(quantize, x, p);
}

void quantize_zeros(Tensor x, Tensor y, Tensor scales, Tensor zeros) {
    using torch::headeronly::ScalarType;
    check(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1) &&
              y.scalar_type() == ScalarType::Char,
          "quantize_zeros: x must be [num_tokens, size], and out int8 of that shape");
    check(scales.numel() == x.size(0) && zeros.numel() == x.size(0) && scales.is_contiguous() &&
              zeros.is_contiguous() && scales.scalar_type() == ScalarType::Float &&
              zeros.scalar_type() == ScalarType::Int,
          "quantize_zeros: scales and zeros must be contiguous [num_tokens], fp32 and int32");
    QuantizeZerosParams p{};
    p.x = in(x);
    p.out = static_cast<int8_t*>(out(y));
    p.scales = static_cast<float*>(out(scales));
    p.zeros = static_cast<int32_t*>(out(zeros));
    p.num_tokens = x.size(0);
    p.size = x.size(1);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.dtype = dtype_of(x, "x");
    FK_LAUNCH(quantize_zeros, x, p);
}

void register_quant(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("quantize_zeros", TORCH_BOX(&quantize_zeros));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("quantize(Tensor x, int kind, Tensor(a!) out, Tensor(b!) scales) -> ()");
    m.def("quantize_zeros(Tensor x, Tensor(a!) out, Tensor(b!) scales, Tensor(c!) zeros) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_quant)
