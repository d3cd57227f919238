#include "fastkernels/gemm.h"

#include <optional>

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool constant_weight, Tensor y) {
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == y.size(0) &&
              weight.size(0) == y.size(1),
          "linear: x must be [num_tokens, in_size], weight [out_size, in_size] and out [num_tokens, out_size]");
    check(x.size(0) <= kLinearMaxTokens, "linear: num_tokens is ", x.size(0), ", but the op takes at most ",
          kLinearMaxTokens);
    LinearParams p{};
    p.x = in(x);
    p.weight = in(weight);
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = weight.size(0);
    p.x_token_stride = x.stride(0);
    p.weight_row_stride = weight.stride(0);
    p.out_token_stride = y.stride(0);
    p.constant_weight = constant_weight;
    p.dtype = dtype_of(x, "x");
    check(dtype_of(weight, "weight") == p.dtype && dtype_of(y, "out") == p.dtype &&
              (!bias || dtype_of(*bias, "bias") == p.dtype),
          "linear: weight, bias and out must have the dtype of x");
    FK_LAUNCH(linear, x, p);
}

ScaleType scale_type_of(const Tensor& scales) {
    using torch::headeronly::ScalarType;
    switch (scales.scalar_type()) {
        case ScalarType::Float: return ScaleType::f32;
        case ScalarType::Half: return ScaleType::f16;
        case ScalarType::BFloat16: return ScaleType::bf16;
        case ScalarType::Float8_e4m3fn: return ScaleType::e4m3;
        case ScalarType::Byte: return ScaleType::e8m0;
        default: fail("quantized_linear: scales must be fp32, fp16, bf16, e4m3 or uint8, which is an exponent");
    }
}

// weight_type: 0 int8, 1 int4, 2 e2m1, 3 e4m3; activation: 0 none, 1 int8 and 2 e4m3 per token, 3 e4m3 per block
void quantized_linear(Tensor x, Tensor weight, Tensor scales, std::optional<Tensor> zeros,
                      std::optional<Tensor> global_scale, std::optional<Tensor> bias, int64_t weight_type,
                      int64_t block_rows, int64_t block_size, int64_t activation, Tensor y) {
    using torch::headeronly::ScalarType;
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && scales.dim() == 2 && x.size(0) == y.size(0) &&
              weight.size(0) == y.size(1),
          "quantized_linear: x must be [num_tokens, in_size], weight and scales have 2 dimensions, and out be "
          "[num_tokens, out_size]");
    check(weight_type >= 0 && weight_type <= 3 && activation >= 0 && activation <= 3 && block_rows > 0 &&
              block_size > 0,
          "quantized_linear: there is no such weight_type, activation or block");
    QuantizedLinearParams p{};
    p.weight_type = static_cast<WeightType>(weight_type);
    p.activation = static_cast<Activation>(activation);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = weight.size(0);
    p.block_rows = block_rows;
    p.block_size = block_size;
    const bool is_half_byte = p.weight_type == WeightType::int4 || p.weight_type == WeightType::e2m1;
    const bool is_fp8 = p.weight_type == WeightType::e4m3;
    const auto stored = is_fp8 ? ScalarType::Float8_e4m3fn : is_half_byte ? ScalarType::Byte : ScalarType::Char;
    check(weight.scalar_type() == stored && weight.is_contiguous() &&
              weight.size(1) * (is_half_byte ? 2 : 1) == p.in_size && p.in_size <= kQuantizedMaxInSize,
          "quantized_linear: weight must be contiguous [out_size, in_size] of its type, or uint8 [out_size, in_size / "
          "2], with an in_size up to ", kQuantizedMaxInSize);
    const bool whole_row = block_size >= p.in_size, divides = p.in_size % block_size == 0;
    check(is_fp8 || (block_rows == 1 && (whole_row || (is_half_byte && divides && (128 % block_size == 0 ||
                                                                                   block_size % 128 == 0) &&
                                                       block_size >= 16))),
          "quantized_linear: scales must be one a row, or in 4 bits one for 16, 32, 64 or a multiple of 128 elements");
    const int64_t scale_rows = (p.out_size + block_rows - 1) / block_rows;
    const int64_t scale_size = (p.in_size + block_size - 1) / block_size;
    check(scales.size(0) == scale_rows && scales.size(1) == scale_size && scales.is_contiguous(),
          "quantized_linear: scales must be contiguous [", scale_rows, ", ", scale_size, "]");
    check(!zeros || (p.weight_type == WeightType::int4 && zeros->scalar_type() == ScalarType::Byte &&
                     zeros->is_contiguous() && zeros->dim() == 2 && zeros->size(0) == scale_rows &&
                     zeros->size(1) == scale_size),
          "quantized_linear: zeros are for int4, contiguous uint8 of the shape of scales");
    check(!global_scale || (global_scale->scalar_type() == ScalarType::Float && global_scale->numel() == 1),
          "quantized_linear: global_scale must be one fp32 value");
    check(p.activation == Activation::none || (p.activation == Activation::int8_token && !is_half_byte && !is_fp8) ||
              (p.activation != Activation::int8_token && is_fp8),
          "quantized_linear: x is rounded to int8 with int8 weights, and to e4m3 with e4m3 weights");
    p.x = in(x);
    p.weight = static_cast<const uint8_t*>(in(weight));
    p.scales = in(scales);
    p.zeros = zeros ? static_cast<const uint8_t*>(in(*zeros)) : nullptr;
    p.global_scale = global_scale ? static_cast<const float*>(in(*global_scale)) : nullptr;
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.scale_type = scale_type_of(scales);
    p.dtype = dtype_of(x, "x");
    check(dtype_of(y, "out") == p.dtype && (!bias || dtype_of(*bias, "bias") == p.dtype),
          "quantized_linear: bias and out must have the dtype of x");
    check(!x.is_cuda(), "quantized_linear: on CUDA weights are repacked first, and are weight_only_linear's");
    if (is_fp8) {
        fp8_linear_cpu(p);
    } else {
        integer_linear_cpu(p);
    }
}

// format: PackedFormat
void weight_only_linear(Tensor x, Tensor packed, Tensor row_factors, std::optional<Tensor> bias, int64_t format,
                        int64_t tactic, bool constant_weight, Tensor y) {
    using torch::headeronly::ScalarType;
    check(x.dim() == 2 && y.dim() == 2 && row_factors.dim() == 1 && x.size(0) == y.size(0) &&
              y.size(1) == row_factors.size(0),
          "weight_only_linear: x must be [num_tokens, in_size], row_factors [out_size] and out [num_tokens, out_size]");
    check(format >= 0 && format < kNumPackedFormats && x.size(1) <= kQuantizedMaxInSize && x.stride(0) <= (1 << 24),
          "weight_only_linear: there is no such format, or x has more than ", kQuantizedMaxInSize, " columns");
    WeightOnlyParams p{};
    p.format = static_cast<PackedFormat>(format);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = y.size(1);
    check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
              row_factors.scalar_type() == ScalarType::Float && row_factors.is_contiguous(),
          "weight_only_linear: packed must be contiguous uint8, and row_factors contiguous fp32");
#if FASTKERNELS_WITH_CUDA
    check(packed.numel() == packed_bytes(p.format, p.out_size, p.in_size), "weight_only_linear: packed has ",
          packed.numel(), " bytes, but this format takes ", packed_bytes(p.format, p.out_size, p.in_size));
#endif
    p.x = in(x);
    p.packed = static_cast<const uint8_t*>(in(packed));
    p.row_factors = static_cast<const float*>(in(row_factors));
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.tactic = static_cast<int>(tactic);
    p.constant_weight = constant_weight;
    p.dtype = dtype_of(x, "x");
    check(dtype_of(y, "out") == p.dtype && (!bias || dtype_of(*bias, "bias") == p.dtype),
          "weight_only_linear: bias and out must have the dtype of x");
#if FASTKERNELS_WITH_CUDA
    if (x.is_cuda()) {
        torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
        weight_only_linear_cuda(p, stream_of(x));
        return;
    }
#endif
    fail("weight_only_linear: the op runs on CUDA only; quantized_linear on the CPU too");
}

void register_gemm(torch::stable::detail::StableLibrary& m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool constant_weight, Tensor(a!) out) -> ()");
    m.def(
        "quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? global_scale, Tensor? bias, "
        "int weight_type, int block_rows, int block_size, int activation, Tensor(a!) out) -> ()");
    m.def(
        "weight_only_linear(Tensor x, Tensor packed, Tensor row_factors, Tensor? bias, int format, int tactic, "
        "bool constant_weight, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_gemm)
