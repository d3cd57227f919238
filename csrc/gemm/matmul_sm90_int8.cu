// matmul_sm90 for int8 with a scale a token and a row of the weight
#include "gemm/matmul_sm90.cuh"

namespace fastkernels {

template void matmul_sm90_tile<int8_t, MatmulScales::channel>(const MatmulArgs&, int, int, void*);

}  // namespace fastkernels
