// weight_only_sm90.cuh of int4 with x in e4m3.
#include "gemm/weight_only_sm90.cuh"

namespace fastkernels {

void weight_only_sm90_int4_e4m3(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::int4_e4m3_g128: return run_weight_only_sm90<Int4E4m3<128>>(args, tokens, stream);
        case PackedFormat::int4_e4m3_g64: return run_weight_only_sm90<Int4E4m3<64>>(args, tokens, stream);
        case PackedFormat::int4_e4m3_g32: return run_weight_only_sm90<Int4E4m3<32>>(args, tokens, stream);
        default: fail("weight_only_linear: this file has int4 for e4m3");
    }
}

}  // namespace fastkernels
