// weight_only_sm90.cuh of int4 with a zero point for every group.
#include "gemm/weight_only_sm90.cuh"

namespace fastkernels {

void weight_only_sm90_int4_zeros(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::int4_g128_zeros: return run_weight_only_sm90<Int4<128, true>>(args, tokens, stream);
        case PackedFormat::int4_g64_zeros: return run_weight_only_sm90<Int4<64, true>>(args, tokens, stream);
        case PackedFormat::int4_g32_zeros: return run_weight_only_sm90<Int4<32, true>>(args, tokens, stream);
        default: fail("weight_only_linear: this file has int4 with zero points");
    }
}

}  // namespace fastkernels
