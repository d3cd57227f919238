// weight_only_run.cuh of e2m1: NVFP4 and MXFP4.
#include "gemm/weight_only_run.cuh"

namespace fastkernels {

void weight_only_fp4(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::nvfp4: return run_weight_only<E2m1<16>>(p, sides, stream);
        case PackedFormat::mxfp4: return run_weight_only<E2m1<32>>(p, sides, stream);
        default: fail("weight_only_linear: this file has nvfp4 and mxfp4");
    }
}

}  // namespace fastkernels
