#include "gemm/linear.cuh"
#include "gemm/linear_bytes.h"

namespace fastkernels {

void linear_bytes(const MatmulParams& p, void* stream) {
    check(fits_linear_bytes(p), "matmul: the tactic of few tokens takes fp8 and int8, up to ", kLinearBytesMaxTokens,
          " tokens, an in_size that is a multiple of 16, and no gate, residual or out in bytes");
    if (p.scales == MatmulScales::block) {
        run_linear<__nv_fp8_e4m3, MatmulScales::block>(p, stream);
    } else if (p.dtype == DType::e5m2) {
        run_linear<__nv_fp8_e5m2, MatmulScales::channel>(p, stream);
    } else if (p.dtype == DType::i8) {
        run_linear<int8_t, MatmulScales::channel>(p, stream);
    } else {
        run_linear<__nv_fp8_e4m3, MatmulScales::channel>(p, stream);
    }
}

}  // namespace fastkernels
