// matmul_sm90 for int8 with a scale a token and a row of the weight
#include "gemm/matmul_sm90.cuh"
#include "gemm/matmul_sm90_few.cuh"

namespace fastkernels {

template void matmul_sm90_tile<int8_t, MatmulScales::channel>(const MatmulArgs&, int, int, void*);
template void matmul_sm90_few<int8_t, MatmulScales::channel>(const MatmulArgs&, int, void*);

}  // namespace fastkernels
