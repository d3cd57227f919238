// matmul_sm90 for bf16
#include "gemm/matmul_sm90.cuh"

namespace fastkernels {

template void matmul_sm90_tile<bf16, MatmulScales::none>(const MatmulArgs&, int, int, void*);

}  // namespace fastkernels
