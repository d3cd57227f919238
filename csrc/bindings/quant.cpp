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
    p.bytes = byte_scales("quantize", y, kind, scales);
    p.num_tokens = x.size(0);
    p.size = x.size(1);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.dtype = dtype_of(x, "x");
    FK_LAUNCH(quantize, x, p);
}

void register_quant(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize", TORCH_BOX(&quantize));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("quantize(Tensor x, int kind, Tensor(a!) out, Tensor(b!) scales) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_quant)
