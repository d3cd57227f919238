#include "gemm/linear.cuh"

namespace fastkernels {

void linear_cuda(const LinearParams& p, void* stream) {
    if (p.num_tokens == 0 || p.out_size == 0) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    check(address % 16 == 0 && (p.in_size | p.x_token_stride | p.weight_row_stride) % 8 == 0,
          "linear on CUDA: x and weight must be aligned to 16 bytes, and in_size and their strides multiples of 8");
    const auto run = [&]<typename T>() {
        if (p.num_tokens <= 8) {
            launch_linear<T, 1, 1, 8, 3, 2>(p, stream);
        } else {
            launch_linear<T, 1, 2, 8, 2, 2>(p, stream);
        }
    };
    switch (p.dtype) {
        case DType::bf16: return run.template operator()<bf16>();
        case DType::f16: return run.template operator()<fp16>();
        default: fail("linear on CUDA: dtype ", name(p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace fastkernels
