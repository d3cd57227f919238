// weight_only_sm90.cuh of e2m1: NVFP4 and MXFP4.
#include "gemm/weight_only_sm90.cuh"

namespace fastkernels {

void weight_only_sm90_fp4(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::nvfp4: return run_weight_only_sm90<E2m1<16>>(args, tokens, stream);
        case PackedFormat::mxfp4: return run_weight_only_sm90<E2m1<32>>(args, tokens, stream);
        default: fail("weight_only_linear: this file has nvfp4 and mxfp4");
    }
}

}  // namespace fastkernels
