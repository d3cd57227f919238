// weight_only_sm90.cuh of int4 with the zero point 8.
#include "gemm/weight_only_sm90.cuh"

namespace fastkernels {

void weight_only_sm90_int4(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::int4_g128: return run_weight_only_sm90<Int4<128, false>>(args, tokens, stream);
        case PackedFormat::int4_g64: return run_weight_only_sm90<Int4<64, false>>(args, tokens, stream);
        case PackedFormat::int4_g32: return run_weight_only_sm90<Int4<32, false>>(args, tokens, stream);
        default: fail("weight_only_linear: this file has int4 without zero points");
    }
}

}  // namespace fastkernels
