// weight_only_run.cuh of int4 with a zero point for every group.
#include "gemm/weight_only_run.cuh"

namespace fastkernels {

void weight_only_int4_zeros(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::int4_g128_zeros:
            return run_weight_only<Int4<128, true>, DigitInt4<128, true>>(p, sides, stream);
        case PackedFormat::int4_g64_zeros:
            return run_weight_only<Int4<64, true>, DigitInt4<64, true>>(p, sides, stream);
        case PackedFormat::int4_g32_zeros:
            return run_weight_only<Int4<32, true>, DigitInt4<32, true>>(p, sides, stream);
        default: fail("weight_only_linear: this file has int4 with zero points");
    }
}

}  // namespace fastkernels
