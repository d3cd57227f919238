// weight_only.cuh of int4 with x in e4m3: for any number of tokens, where Hopper's kernel of it does not run.
#include "gemm/weight_only.cuh"

namespace fastkernels {
namespace {

template <typename F>
void run_of_dtype(const WeightOnlyParams& p, void* stream) {
    switch (p.dtype) {
        case DType::bf16: return run_weight_only_more<bf16, F>(p, room_of_device(), stream);
        case DType::f16: return run_weight_only_more<fp16, F>(p, room_of_device(), stream);
        default: fail("weight_only_linear: dtype ", name(p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace

void weight_only_int4_e4m3(const WeightOnlyParams& p, void* stream) {
    switch (p.format) {
        case PackedFormat::int4_e4m3_g128: return run_of_dtype<Int4OfBytes<128>>(p, stream);
        case PackedFormat::int4_e4m3_g64: return run_of_dtype<Int4OfBytes<64>>(p, stream);
        case PackedFormat::int4_e4m3_g32: return run_of_dtype<Int4OfBytes<32>>(p, stream);
        default: fail("weight_only_linear: this file has int4 for x in e4m3");
    }
}

}  // namespace fastkernels
