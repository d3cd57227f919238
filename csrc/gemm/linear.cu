#include <algorithm>

#include "gemm/linear.cuh"

namespace fastkernels {

void linear_cuda(const LinearParams& p, void* stream) {
    if (p.num_tokens == 0 || p.out_size == 0) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    check(address % 16 == 0 && (p.in_size | p.x_token_stride | p.weight_row_stride) % 8 == 0,
          "linear on CUDA: x and weight must be aligned to 16 bytes, and in_size and their strides multiples of 8");
    MatmulParams params{.x = p.x,
                        .weight = p.weight,
                        .bias = p.bias,
                        .out = p.out,
                        .num_tokens = p.num_tokens,
                        .in_size = p.in_size,
                        .out_size = p.out_size,
                        .x_token_stride = p.x_token_stride,
                        .weight_row_stride = p.weight_row_stride,
                        .out_token_stride = p.out_token_stride,
                        .constant_weight = p.constant_weight,
                        .gated = p.gated,
                        .dtype = p.dtype,
                        .out_dtype = p.dtype};
    for (int64_t first = 0; first < p.num_tokens; first += kTokens) {
        params.num_tokens = std::min<int64_t>(p.num_tokens - first, kTokens);
        params.x = static_cast<const uint16_t*>(p.x) + first * p.x_token_stride;
        params.out = static_cast<uint16_t*>(p.out) + first * p.out_token_stride;
        switch (p.dtype) {
            case DType::bf16: run_linear<bf16, MatmulScales::none>(params, stream); break;
            case DType::f16: run_linear<fp16, MatmulScales::none>(params, stream); break;
            default: fail("linear on CUDA: dtype ", name(p.dtype), " is not supported: bf16 and fp16 are");
        }
    }
}

}  // namespace fastkernels
