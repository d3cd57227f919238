// weight_only_run.cuh of int4 with x in e4m3, where Hopper's kernel of it does not run.
#include "gemm/weight_only_run.cuh"

namespace fastkernels {

void weight_only_int4_e4m3(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::int4_e4m3_g128: return run_weight_only<Int4OfBytes<128>>(p, sides, stream);
        case PackedFormat::int4_e4m3_g64: return run_weight_only<Int4OfBytes<64>>(p, sides, stream);
        case PackedFormat::int4_e4m3_g32: return run_weight_only<Int4OfBytes<32>>(p, sides, stream);
        default: fail("weight_only_linear: this file has int4 for x in e4m3");
    }
}

}  // namespace fastkernels
