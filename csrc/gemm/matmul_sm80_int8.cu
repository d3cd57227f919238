// matmul_sm80 for int8 with a scale a token and a row of the weight
#include "gemm/matmul_sm80.cuh"

namespace fastkernels {

template void matmul_sm80_tile<int8_t, MatmulScales::channel>(const MatmulParams&, int, void*);

}  // namespace fastkernels
