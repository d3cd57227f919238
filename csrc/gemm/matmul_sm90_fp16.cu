// matmul_sm90 for fp16
#include "gemm/matmul_sm90.cuh"
#include "gemm/matmul_sm90_few.cuh"

namespace fastkernels {

template void matmul_sm90_tile<fp16, MatmulScales::none>(const MatmulArgs&, int, int, void*);
template void matmul_sm90_few<fp16, MatmulScales::none>(const MatmulArgs&, int, void*);

}  // namespace fastkernels
