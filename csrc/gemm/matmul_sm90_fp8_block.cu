// matmul_sm90 for e4m3 with scales of blocks
#include "gemm/matmul_sm90.cuh"

namespace fastkernels {

template void matmul_sm90_tile<__nv_fp8_e4m3, MatmulScales::block>(const MatmulArgs&, int, int, void*);

}  // namespace fastkernels
