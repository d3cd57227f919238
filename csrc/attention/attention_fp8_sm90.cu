// The launcher of attention_fp8_sm90: one block an SM.
#include "attention/attention_fp8_sm90.cuh"
#include "common/dtype.cuh"

namespace fastkernels {
namespace {

template <typename T>
void launch_fp8(const Sm90Args& args, void* stream) {
    launch(args.a.p.soft_cap > 0.0f ? attention_fp8_sm90_kernel<T, true> : attention_fp8_sm90_kernel<T, false>,
           {.grid = dim3(num_sms()), .block = dim3(Fp8Shape::kThreads), .shared_bytes = sizeof(Fp8Shared), .pdl = true},
           stream, args);
}

}  // namespace

void attention_fp8_sm90(const AttentionMmaArgs& a, void* stream) {
    const Sm90Element element{CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
    const Sm90Args args = sm90_args(a, element, element, 64);
    a.p.dtype == DType::bf16 ? launch_fp8<bf16>(args, stream) : launch_fp8<fp16>(args, stream);
}

}  // namespace fastkernels
