// matmul_sm90 for e4m3 with scales of blocks
#include "gemm/matmul_sm90.cuh"
#include "gemm/matmul_sm90_few.cuh"

namespace fastkernels {

template void matmul_sm90_tile<__nv_fp8_e4m3, MatmulScales::block>(const MatmulArgs&, int, int, void*);
template void matmul_sm90_few<__nv_fp8_e4m3, MatmulScales::block>(const MatmulArgs&, int, void*);

}  // namespace fastkernels
