// weight_only_sm90_split.cuh of the formats of 4 bits, and which products it takes.
#include "gemm/weight_only_sm90.h"
#include "gemm/weight_only_sm90_split.cuh"

namespace fastkernels {
namespace {

template <typename F>
bool run_weight_only_split(const WeightOnlyParams& p, void* stream) {
    switch (p.dtype) {
        case DType::bf16: return launch_weight_only_split<bf16, F>(p, stream);
        case DType::f16: return launch_weight_only_split<fp16, F>(p, stream);
        default: fail("weight_only_linear: dtype ", name(p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace

bool weight_only_sm90_split(const WeightOnlyParams& p, void* stream) {
    if (p.num_tokens <= 8 || p.num_tokens > kSplitTokens) {
        return false;
    }
    // By timings on an H200 (docs/kernels/gemm.md): e2m1, which is more work to unpack, where there are many rows.
    const bool is_e2m1 = p.format == PackedFormat::nvfp4 || p.format == PackedFormat::mxfp4;
    if (is_e2m1 && p.out_size < int64_t{kWeightTileRows} * num_sms()) {
        return false;
    }
    switch (p.format) {
        case PackedFormat::int4_g128: return run_weight_only_split<Int4<128, false>>(p, stream);
        case PackedFormat::int4_g64: return run_weight_only_split<Int4<64, false>>(p, stream);
        case PackedFormat::int4_g32: return run_weight_only_split<Int4<32, false>>(p, stream);
        case PackedFormat::int4_g128_zeros: return run_weight_only_split<Int4<128, true>>(p, stream);
        case PackedFormat::int4_g64_zeros: return run_weight_only_split<Int4<64, true>>(p, stream);
        case PackedFormat::int4_g32_zeros: return run_weight_only_split<Int4<32, true>>(p, stream);
        case PackedFormat::nvfp4: return run_weight_only_split<E2m1<16>>(p, stream);
        case PackedFormat::mxfp4: return run_weight_only_split<E2m1<32>>(p, stream);
        default: return false;
    }
}

}  // namespace fastkernels
