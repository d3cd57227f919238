// matmul_sm90 for bf16
#include "gemm/matmul_sm90.cuh"
#include "gemm/matmul_sm90_few.cuh"

namespace fastkernels {

template void matmul_sm90_tile<bf16, MatmulScales::none>(const MatmulArgs&, int, int, void*);
template void matmul_sm90_few<bf16, MatmulScales::none>(const MatmulArgs&, int, void*);

}  // namespace fastkernels
