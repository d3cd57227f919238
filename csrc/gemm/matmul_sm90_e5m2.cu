// matmul_sm90 for x of e5m2 and a weight of e4m3 with a scale a token and a row of the weight
#include "gemm/matmul_sm90.cuh"
#include "gemm/matmul_sm90_few.cuh"

namespace fastkernels {

template void matmul_sm90_tile<__nv_fp8_e5m2, MatmulScales::channel>(const MatmulArgs&, int, int, void*);
template void matmul_sm90_few<__nv_fp8_e5m2, MatmulScales::channel>(const MatmulArgs&, int, void*);

}  // namespace fastkernels
