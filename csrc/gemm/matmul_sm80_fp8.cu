// matmul_sm80 for fp8 with a scale a token and a row of the weight, and for e4m3 with scales of blocks
#include "gemm/matmul_sm80.cuh"

namespace fastkernels {

template void matmul_sm80_tile<__nv_fp8_e4m3, MatmulScales::channel>(const MatmulParams&, int, void*);
template void matmul_sm80_tile<__nv_fp8_e5m2, MatmulScales::channel>(const MatmulParams&, int, void*);
template void matmul_sm80_tile<__nv_fp8_e4m3, MatmulScales::block>(const MatmulParams&, int, void*);

}  // namespace fastkernels
