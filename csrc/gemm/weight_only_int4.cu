// weight_only_run.cuh of int4 with the zero point 8.
#include "gemm/weight_only_run.cuh"

namespace fastkernels {

void weight_only_int4(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::int4_g128: return run_weight_only<Int4<128, false>, DigitInt4<128, false>>(p, sides, stream);
        case PackedFormat::int4_g64: return run_weight_only<Int4<64, false>, DigitInt4<64, false>>(p, sides, stream);
        case PackedFormat::int4_g32: return run_weight_only<Int4<32, false>, DigitInt4<32, false>>(p, sides, stream);
        default: fail("weight_only_linear: this file has int4 without zero points");
    }
}

}  // namespace fastkernels
