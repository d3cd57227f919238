#include "fastkernels/gemm.h"

#include <optional>

#include "bindings/tensor.h"
#include "fastkernels/token_linear.h"

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

// weight: the rows of the gate, then those of up
void linear_silu_mul(Tensor x, Tensor weight, bool constant_weight, Tensor y) {
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == y.size(0) &&
              weight.size(0) == 2 * y.size(1),
          "linear_silu_mul: x must be [num_tokens, in_size], weight [2 * out_size, in_size] and out [num_tokens, "
          "out_size]");
    check(x.size(0) <= kLinearMaxTokens, "linear_silu_mul: num_tokens is ", x.size(0), ", but the op takes at most ",
          kLinearMaxTokens);
    LinearParams p{};
    p.x = in(x);
    p.weight = in(weight);
    p.out = out(y);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = y.size(1);
    p.x_token_stride = x.stride(0);
    p.weight_row_stride = weight.stride(0);
    p.out_token_stride = y.stride(0);
    p.constant_weight = constant_weight;
    p.gated = true;
    p.dtype = dtype_of(x, "x");
    check(dtype_of(weight, "weight") == p.dtype && dtype_of(y, "out") == p.dtype,
          "linear_silu_mul: weight and out must have the dtype of x");
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

// What the rows of an int8 weight add up to.
const int32_t* sums_of(const char* op, const Tensor& sums, int64_t rows) {
    check(sums.scalar_type() == torch::headeronly::ScalarType::Int && sums.numel() == rows && sums.is_contiguous(), op,
          ": weight_sums must be contiguous int32, one a row of weight");
    return static_cast<const int32_t*>(in(sums));
}

// weight_type: 0 int8, 1 int4, 2 e2m1, 3 e4m3; activation: as Activation
void quantized_linear(Tensor x, Tensor weight, Tensor scales, std::optional<Tensor> zeros,
                      std::optional<Tensor> global_scale, std::optional<Tensor> weight_sums, std::optional<Tensor> bias,
                      int64_t weight_type, int64_t block_rows, int64_t block_size, int64_t activation, bool interleaved,
                      Tensor y) {
    using torch::headeronly::ScalarType;
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && scales.dim() == 2 && x.size(0) == y.size(0) &&
              weight.size(0) == y.size(1),
          "quantized_linear: x must be [num_tokens, in_size], weight and scales have 2 dimensions, and out be "
          "[num_tokens, out_size]");
    check(
        weight_type >= 0 && weight_type <= 3 && activation >= 0 && activation <= 5 && block_rows > 0 && block_size > 0,
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
          "2], with an in_size up to ",
          kQuantizedMaxInSize);
    const bool whole_row = block_size >= p.in_size, divides = p.in_size % block_size == 0;
    check(is_fp8 || (block_rows == 1 &&
                     (whole_row || (is_half_byte && divides && (128 % block_size == 0 || block_size % 128 == 0) &&
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
    const bool to_int8 = p.activation == Activation::int8_token || p.activation == Activation::int8_zeros;
    const bool to_e4m3 = p.activation == Activation::e4m3_token;
    check(p.activation == Activation::none || (to_int8 && !is_half_byte && !is_fp8) || (!to_int8 && is_fp8) ||
              (to_e4m3 && p.weight_type == WeightType::int4),
          "quantized_linear: x is rounded to int8 with int8 weights, to fp8 with e4m3 weights, and to e4m3 with int4");
    const bool has_zeros = p.activation == Activation::int8_zeros;
    check(weight_sums.has_value() == has_zeros && (!has_zeros || p.in_size <= kMaxInSizeWithZeros),
          "quantized_linear: weight_sums go with zero points of x, which take an in_size up to ", kMaxInSizeWithZeros);
    p.weight_sums = weight_sums ? sums_of("quantized_linear", *weight_sums, p.out_size) : nullptr;
    p.x = in(x);
    p.weight = static_cast<const uint8_t*>(in(weight));
    p.scales = in(scales);
    p.zeros = zeros ? static_cast<const uint8_t*>(in(*zeros)) : nullptr;
    p.global_scale = global_scale ? static_cast<const float*>(in(*global_scale)) : nullptr;
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.interleaved = interleaved;
    check(!interleaved || (!is_fp8 && weight.size(1) % kInterleavedBytes == 0),
          "quantized_linear: interleaved rows are of int8, int4 or e2m1, and of a multiple of 64 bytes");
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

// What matmul's epilogue adds and gives: bias, residual and out_scale, and out's type by them.
void set_epilogue(MatmulParams& p, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& out_scale, const Tensor& y) {
    p.out_dtype = dtype_of(y, "out");
    const auto is_half = [](DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; };
    check(out_scale ? p.out_dtype == DType::e4m3 || p.out_dtype == DType::i8 : is_half(p.out_dtype), "matmul: out is ",
          name(p.out_dtype), ", but the op gives bf16 and fp16, and with an out_scale e4m3 and int8");
    check(!out_scale || (dtype_of(*out_scale, "out_scale") == DType::f32 && out_scale->numel() == 1),
          "matmul: out_scale must be one fp32 value");
    check(!p.gated || (!bias && !residual), "matmul: with a gate there is neither bias nor residual");
    p.bias_dtype = bias       ? dtype_of(*bias, "bias")
                   : residual ? dtype_of(*residual, "residual")
                              : (out_scale ? DType::bf16 : p.out_dtype);
    check(is_half(p.bias_dtype) && (out_scale || p.bias_dtype == p.out_dtype) &&
              (!residual || dtype_of(*residual, "residual") == p.bias_dtype),
          "matmul: bias and residual must have the dtype of out, or where that is bytes both bf16 or both fp16");
    check(!bias || (bias->dim() == 1 && bias->size(0) == p.out_size && bias->is_contiguous()),
          "matmul: bias must be contiguous [out_size]");
    check(!residual || (residual->dim() == 2 && residual->size(0) == p.num_tokens && residual->size(1) == p.out_size &&
                        (residual->stride(1) == 1 || p.out_size == 1)),
          "matmul: residual must be [num_tokens, out_size], its last dimension contiguous");
    check(y.stride(1) == 1 || p.out_size == 1, "matmul: the last dimension of out must be contiguous");
    check(!residual || in(*residual) != in(y) || (!out_scale && residual->stride(0) == y.stride(0)),
          "matmul: residual in the memory of out must lie as out does");
    p.bias = bias ? in(*bias) : nullptr;
    p.residual = residual ? in(*residual) : nullptr;
    p.residual_token_stride = residual ? residual->stride(0) : 0;
    p.out_scale = out_scale ? static_cast<const float*>(in(*out_scale)) : nullptr;
    p.out = out(y);
    p.out_token_stride = y.stride(0);
}

// gated: weight, its scales and sums are of the gate's rows, then as many of up; tactic: 0 to kNumMatmulTactics - 1, or
// -1: chosen by shape
void matmul(Tensor x, Tensor weight, std::optional<Tensor> x_scales, std::optional<Tensor> weight_scales,
            std::optional<Tensor> x_zeros, std::optional<Tensor> weight_sums, std::optional<Tensor> bias,
            std::optional<Tensor> residual, std::optional<Tensor> out_scale, bool constant_weight, bool gated,
            int64_t tactic, Tensor workspace, Tensor y) {
    check(
        x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == y.size(0) &&
            weight.size(0) == y.size(1) * (gated ? 2 : 1),
        "matmul: x must be [num_tokens, in_size], weight [out_size, in_size], or with a gate [2 * out_size, in_size], "
        "and out [num_tokens, out_size]");
    MatmulParams p{};
    p.dtype = dtype_of(x, "x");
    const DType weight_dtype = p.dtype == DType::e5m2 ? DType::e4m3 : p.dtype;
    check(dtype_of(weight, "weight") == weight_dtype,
          "matmul: weight must have the dtype of x, or e4m3 where that is e5m2");
    const int64_t rows = weight.size(0);
    p.num_tokens = x.size(0);
    p.in_size = x.size(1);
    p.out_size = y.size(1);
    p.gated = gated;
    set_epilogue(p, bias, residual, out_scale, y);
    const bool has_scales = size_bytes(p.dtype) == 1;
    check(x_scales.has_value() == has_scales && weight_scales.has_value() == has_scales,
          "matmul: fp8 and int8 have scales of x and weight, and other types none");
    if (has_scales) {
        check(dtype_of(*x_scales, "x_scales") == DType::f32 &&
                  dtype_of(*weight_scales, "weight_scales") == DType::f32 && x_scales->is_contiguous() &&
                  weight_scales->is_contiguous(),
              "matmul: scales must be contiguous fp32");
        p.scales = x_scales->dim() == 2 ? MatmulScales::block : MatmulScales::channel;
        p.num_weight_scales = weight_scales->numel();
        const int64_t chunks = p.in_size / 128, blocks = (rows + 127) / 128;
        check(p.scales == MatmulScales::block
                  ? p.in_size % 128 == 0 && x_scales->size(0) == p.num_tokens && x_scales->size(1) == chunks &&
                        weight_scales->dim() == 2 && weight_scales->size(0) == blocks &&
                        weight_scales->size(1) == chunks
                  : x_scales->numel() == p.num_tokens && (p.num_weight_scales == rows || p.num_weight_scales == 1),
              "matmul: scales must be [num_tokens] and, of the weight's rows, [rows] or [1], or [num_tokens, in_size / "
              "128] and [ceil(rows / 128), in_size / 128]");
        p.x_scales = static_cast<const float*>(in(*x_scales));
        p.weight_scales = static_cast<const float*>(in(*weight_scales));
    }
    check(x_zeros.has_value() == weight_sums.has_value() && (!x_zeros || p.dtype == DType::i8),
          "matmul: x_zeros are for int8, and go with weight_sums");
    if (x_zeros) {
        check(x_zeros->scalar_type() == torch::headeronly::ScalarType::Int && x_zeros->is_contiguous() &&
                  x_zeros->numel() == p.num_tokens,
              "matmul: x_zeros must be contiguous int32 [num_tokens]");
        p.x_zeros = static_cast<const int32_t*>(in(*x_zeros));
        p.weight_sums = sums_of("matmul", *weight_sums, rows);
    }
    p.x = in(x);
    p.weight = in(weight);
    p.workspace = out(workspace);
    p.x_token_stride = x.stride(0);
    p.weight_row_stride = weight.stride(0);
    p.constant_weight = constant_weight;
    p.tactic = static_cast<int>(tactic);
#if FASTKERNELS_WITH_CUDA
    if (x.is_cuda()) {
        torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
        check(workspace.numel() * static_cast<int64_t>(workspace.element_size()) >= matmul_needs_bytes(),
              "matmul: workspace must have ", matmul_needs_bytes(), " bytes");
        return matmul_cuda(p, stream_of(x));
    }
#endif
    fail("matmul: there is no kernel for the CPU; linear and quantized_linear have one");
}

// x: bytes, with x_scales, or with norm_weight a row of the dtype of out
void token_linear(Tensor x, std::optional<Tensor> x_scales, std::optional<Tensor> norm_weight,
                  [[maybe_unused]] double eps, Tensor weight, Tensor weight_scales, std::optional<Tensor> bias,
                  bool constant_weight, [[maybe_unused]] bool adds, Tensor y) {
    check(x.dim() == 2 && weight.dim() == 2 && y.dim() == 2 && x.size(0) == 1 && y.size(0) == 1 &&
              x.size(1) == weight.size(1) && weight.size(0) == y.size(1),
          "token_linear: x must be [1, in_size], weight [out_size, in_size] and out [1, out_size]");
    check(x.stride(1) == 1 && weight.stride(1) == 1 && y.stride(1) == 1,
          "token_linear: the last dimension of x, weight and out must be contiguous");
    check(x_scales.has_value() != norm_weight.has_value(),
          "token_linear: x is bytes with x_scales, or has a norm_weight");
    MatmulParams p{};
    p.dtype = dtype_of(weight, "weight");
    p.out_dtype = dtype_of(y, "out");
    check(p.out_dtype == DType::bf16 || p.out_dtype == DType::f16, "token_linear: out must be bf16 or fp16");
    check(dtype_of(x, "x") == (norm_weight ? p.out_dtype : p.dtype) &&
              (!norm_weight || (dtype_of(*norm_weight, "norm_weight") == p.out_dtype &&
                                norm_weight->numel() == x.size(1) && norm_weight->is_contiguous())) &&
              (!bias || (dtype_of(*bias, "bias") == p.out_dtype && bias->numel() == y.size(1))),
          "token_linear: x must have the dtype of weight, or with a norm_weight [in_size] that of out, which bias "
          "[out_size] and norm_weight have too");
    check(dtype_of(weight_scales, "weight_scales") == DType::f32 && weight_scales.is_contiguous() &&
              (weight_scales.numel() == y.size(1) || weight_scales.numel() == 1) &&
              (!x_scales || (dtype_of(*x_scales, "x_scales") == DType::f32 && x_scales->numel() == 1)),
          "token_linear: scales must be contiguous fp32, x_scales [1] and weight_scales [out_size] or [1]");
    p.scales = MatmulScales::channel;
    p.x = in(x);
    p.x_scales = x_scales ? static_cast<const float*>(in(*x_scales)) : nullptr;
    p.weight = in(weight);
    p.weight_scales = static_cast<const float*>(in(weight_scales));
    p.num_weight_scales = weight_scales.numel();
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.num_tokens = 1;
    p.in_size = x.size(1);
    p.out_size = y.size(1);
    p.x_token_stride = x.stride(0);
    p.weight_row_stride = weight.stride(0);
    p.out_token_stride = y.stride(0);
    p.constant_weight = constant_weight;
#if FASTKERNELS_WITH_CUDA
    if (x.is_cuda()) {
        torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
        const TokenNorm norm{.weight = norm_weight ? in(*norm_weight) : nullptr, .eps = static_cast<float>(eps)};
        return token_linear_cuda(p, norm, adds, stream_of(x));
    }
#endif
    fail("token_linear: the op runs on CUDA only; rms_norm_quant and quantized_linear on the CPU too");
}

// norm_weight: of a norm before the product; gated: packed has the rows of the gate, then those of up
void token_weight_only_linear(Tensor x, std::optional<Tensor> norm_weight, [[maybe_unused]] double eps, Tensor packed,
                              Tensor row_factors, std::optional<Tensor> bias, int64_t format, int64_t tactic,
                              bool constant_weight, [[maybe_unused]] bool adds, bool gated, Tensor y) {
    using torch::headeronly::ScalarType;
    check(x.dim() == 2 && y.dim() == 2 && x.size(0) == 1 && y.size(0) == 1 &&
              row_factors.numel() == y.size(1) * (gated ? 2 : 1),
          "token_weight_only_linear: x must be [1, in_size], out [1, out_size] and row_factors [out_size], or with a "
          "gate [2 * out_size]");
    check(x.stride(1) == 1 && y.stride(1) == 1,
          "token_weight_only_linear: the last dimension of x and out must be "
          "contiguous");
    check(format >= 0 && format < kNumPackedFormats && x.size(1) <= kQuantizedMaxInSize,
          "token_weight_only_linear: there is no such format, or x has more than ", kQuantizedMaxInSize, " columns");
    check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
              row_factors.scalar_type() == ScalarType::Float && row_factors.is_contiguous(),
          "token_weight_only_linear: packed must be contiguous uint8, and row_factors contiguous fp32");
    WeightOnlyParams p{};
    p.format = static_cast<PackedFormat>(format);
    p.dtype = dtype_of(y, "out");
    check(dtype_of(x, "x") == p.dtype &&
              (!norm_weight || (dtype_of(*norm_weight, "norm_weight") == p.dtype && norm_weight->numel() == x.size(1) &&
                                norm_weight->is_contiguous())) &&
              (!bias || (dtype_of(*bias, "bias") == p.dtype && bias->numel() == row_factors.numel())),
          "token_weight_only_linear: norm_weight [in_size], bias, of as many as row_factors, and out must have the "
          "dtype of x");
    p.x = in(x);
    p.packed = static_cast<const uint8_t*>(in(packed));
    p.row_factors = static_cast<const float*>(in(row_factors));
    p.bias = bias ? in(*bias) : nullptr;
    p.out = out(y);
    p.num_tokens = 1;
    p.in_size = x.size(1);
    p.out_size = y.size(1);
    p.x_token_stride = x.stride(0);
    p.out_token_stride = y.stride(0);
    p.tactic = static_cast<int>(tactic);
    p.constant_weight = constant_weight;
#if FASTKERNELS_WITH_CUDA
    if (x.is_cuda()) {
        check(packed.numel() == packed_bytes(p.format, row_factors.numel(), p.in_size),
              "token_weight_only_linear: packed has ", packed.numel(), " bytes, but this format takes ",
              packed_bytes(p.format, row_factors.numel(), p.in_size));
        torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
        const TokenNorm norm{.weight = norm_weight ? in(*norm_weight) : nullptr, .eps = static_cast<float>(eps)};
        return token_weight_only_linear_cuda(p, {.norm = norm, .adds = adds, .gated = gated}, stream_of(x));
    }
#endif
    fail("token_weight_only_linear: the op runs on CUDA only; rms_norm and quantized_linear on the CPU too");
}

void interleave_rows(Tensor rows, Tensor y) {
    check(rows.dim() == 2 && y.dim() == 2 && rows.size(0) == y.size(0) && rows.size(1) == y.size(1) &&
              rows.is_contiguous() && y.is_contiguous() && rows.scalar_type() == y.scalar_type() &&
              rows.element_size() == 1 && rows.size(1) % kInterleavedBytes == 0,
          "interleave_rows: rows and out must be contiguous, of one byte an element and a multiple of 64 a row");
    check(!rows.is_cuda(), "interleave_rows: it is for the CPU");
    interleave_rows_cpu(
        {static_cast<const uint8_t*>(in(rows)), static_cast<uint8_t*>(out(y)), rows.size(0), rows.size(1)});
}

// x_scales: of x in e4m3, by the format; format: PackedFormat
void weight_only_linear(Tensor x, std::optional<Tensor> x_scales, Tensor packed, Tensor row_factors,
                        std::optional<Tensor> bias, int64_t format, int64_t tactic, bool constant_weight, Tensor y) {
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
    p.dtype = dtype_of(y, "out");
    check(takes_e4m3(p.format) == x_scales.has_value() && dtype_of(x, "x") == (x_scales ? DType::e4m3 : p.dtype) &&
              (!bias || dtype_of(*bias, "bias") == p.dtype),
          "weight_only_linear: bias and out must have the dtype of x, which with int4_e4m3 formats is e4m3 with "
          "x_scales");
    if (x_scales) {
        check(x_scales->scalar_type() == ScalarType::Float && x_scales->is_contiguous() &&
                  x_scales->numel() == p.num_tokens,
              "weight_only_linear: x_scales must be contiguous fp32 [num_tokens]");
        p.x_scales = static_cast<const float*>(in(*x_scales));
    }
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
    m.impl("linear_silu_mul", TORCH_BOX(&linear_silu_mul));
    m.impl("matmul", TORCH_BOX(&matmul));
    m.impl("token_linear", TORCH_BOX(&token_linear));
    m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    m.impl("interleave_rows", TORCH_BOX(&interleave_rows));
    m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
    m.impl("token_weight_only_linear", TORCH_BOX(&token_weight_only_linear));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool constant_weight, Tensor(a!) out) -> ()");
    m.def("linear_silu_mul(Tensor x, Tensor weight, bool constant_weight, Tensor(a!) out) -> ()");
    m.def(
        "matmul(Tensor x, Tensor weight, Tensor? x_scales, Tensor? weight_scales, Tensor? x_zeros, "
        "Tensor? weight_sums, Tensor? bias, Tensor? residual, Tensor? out_scale, bool constant_weight, bool gated, "
        "int tactic, Tensor(a!) workspace, Tensor(b!) out) -> ()");
    m.def(
        "token_linear(Tensor x, Tensor? x_scales, Tensor? norm_weight, float eps, Tensor weight, Tensor weight_scales, "
        "Tensor? bias, bool constant_weight, bool adds, Tensor(a!) out) -> ()");
    m.def(
        "quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? global_scale, "
        "Tensor? weight_sums, Tensor? bias, int weight_type, int block_rows, int block_size, int activation, bool "
        "interleaved, Tensor(a!) out) -> ()");
    m.def("interleave_rows(Tensor rows, Tensor(a!) out) -> ()");
    m.def(
        "weight_only_linear(Tensor x, Tensor? x_scales, Tensor packed, Tensor row_factors, Tensor? bias, int format, "
        "int tactic, bool constant_weight, Tensor(a!) out) -> ()");
    m.def(
        "token_weight_only_linear(Tensor x, Tensor? norm_weight, float eps, Tensor packed, Tensor row_factors, "
        "Tensor? bias, int format, int tactic, bool constant_weight, bool adds, bool gated, Tensor(a!) out) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_gemm)
