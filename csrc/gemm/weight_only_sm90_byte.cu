// weight_only_sm90.cuh of int8 and e4m3.
#include "gemm/weight_only_sm90.cuh"

namespace fastkernels {

void weight_only_sm90_byte(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::int8: return run_weight_only_sm90<Byte<true>>(args, tokens, stream);
        case PackedFormat::e4m3: return run_weight_only_sm90<Byte<false>>(args, tokens, stream);
        case PackedFormat::e4m3_block: return run_weight_only_sm90<Byte<false, true>>(args, tokens, stream);
        default: fail("weight_only_linear: this file has int8 and e4m3");
    }
}

}  // namespace fastkernels
