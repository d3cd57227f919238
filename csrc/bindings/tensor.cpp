#include "bindings/tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cpu/parallel.h"

#if FASTKERNELS_WITH_CUDA
// Weak, so that one build loads with a CPU torch too, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastkernels {

DType dtype_of(const Tensor& tensor, const char* name) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::Half: return DType::f16;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Int: return DType::i32;
        case ScalarType::Long: return DType::i64;
        case ScalarType::Float8_e4m3fn: return DType::e4m3;
        case ScalarType::Float8_e5m2: return DType::e5m2;
        case ScalarType::Char: return DType::i8;
        default:
            fail(name, " has a dtype that is not supported: fp32, fp16, bf16, int32, int64, e4m3, e5m2 and int8 are");
    }
}

ByteScales byte_scales(const char* op, const Tensor& y, int64_t kind, const Tensor& scales, bool takes_e5m2) {
    using torch::headeronly::ScalarType;
    const bool is_int8 = y.scalar_type() == ScalarType::Char, is_e5m2 = y.scalar_type() == ScalarType::Float8_e5m2;
    check(is_int8 || (is_e5m2 && takes_e5m2) || y.scalar_type() == ScalarType::Float8_e4m3fn, op,
          ": out must be fp8 e4m3 or int8");
    check(y.dim() == 2 && kind >= 0 && kind <= 2, op, ": out must have 2 dimensions, and kind be 0, 1 or 2");
    check(kind != 2 || y.size(1) % kScaleBlock == 0, op, ": blocks take rows of a multiple of ", kScaleBlock);
    const int64_t count = kind == 0 ? 1 : kind == 1 ? y.size(0) : y.size(0) * (y.size(1) / kScaleBlock);
    check(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == count, op,
          ": scales must be ", count, " contiguous fp32 values");
    return {static_cast<float*>(scales.mutable_data_ptr()),
            is_int8   ? ByteType::int8
            : is_e5m2 ? ByteType::e5m2
                      : ByteType::e4m3,
            static_cast<ScaleKind>(kind)};
}

const float* scales_of(const char* op, const char* name, const std::optional<Tensor>& scales, int64_t num_kv_heads) {
    if (!scales) {
        return nullptr;
    }
    check(scales->dim() == 1 && scales->size(0) == num_kv_heads && scales->is_contiguous() &&
              scales->scalar_type() == torch::headeronly::ScalarType::Float,
          op, ": ", name, " must be contiguous fp32 [num_kv_heads]");
    return static_cast<const float*>(in(*scales));
}

#if FASTKERNELS_WITH_CUDA
void* stream_of(const Tensor& tensor) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream != nullptr, "the installed torch is a CPU build: it has no CUDA stream");
    check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
          "torch gave no current CUDA stream");
    return stream;
}
#endif

namespace {

const bool pool_is_torchs = [] {
    cpu::set_parallel_for([](int64_t count, int64_t grain, cpu::RangeFn fn, void* context) {
        torch_parallel_for(0, count, grain, fn, context);
    });
    return true;
}();

}  // namespace

}  // namespace fastkernels
