// linear's kernel for one token and a weight of bytes, with the norm before it and the addition behind it.
#include "gemm/linear.cuh"

namespace fastkernels {
namespace {

template <typename T>
void run(const MatmulParams& p, const TokenNorm& norm, bool adds, void* stream) {
    constexpr auto kScales = MatmulScales::channel;
    norm.weight != nullptr ? run_linear<T, kScales, true>(p, stream, norm, adds)
                           : run_linear<T, kScales, false>(p, stream, norm, adds);
}

}  // namespace

void token_linear_cuda(const MatmulParams& p, const TokenNorm& norm, bool adds, void* stream) {
    if (p.out_size == 0) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                         reinterpret_cast<uintptr_t>(norm.weight);
    check(p.in_size > 0 && address % 16 == 0 && (p.in_size | p.weight_row_stride) % 16 == 0,
          "token_linear: x, norm_weight, weight and its rows must be aligned to 16 bytes, and in_size a multiple of "
          "16");
    check(norm.weight == nullptr || p.in_size <= kTokenLinearMaxSize, "token_linear: in_size is ", p.in_size,
          "; of a row that is normalised it is at most ", kTokenLinearMaxSize);
    switch (p.dtype) {
        case DType::e4m3: return run<__nv_fp8_e4m3>(p, norm, adds, stream);
        case DType::i8: return run<int8_t>(p, norm, adds, stream);
        default: fail("token_linear: a weight of ", name(p.dtype), " is not supported: e4m3 and int8 are");
    }
}

}  // namespace fastkernels
