// weight_only_run.cuh of int8 and e4m3.
#include "gemm/weight_only_run.cuh"

namespace fastkernels {

void weight_only_byte(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::int8: return run_weight_only<Byte<true>, DigitInt8>(p, sides, stream);
        case PackedFormat::e4m3: return run_weight_only<Byte<false>>(p, sides, stream);
        case PackedFormat::e4m3_block: return run_weight_only<Byte<false, true>>(p, sides, stream);
        default: fail("weight_only_linear: this file has int8 and e4m3");
    }
}

}  // namespace fastkernels
