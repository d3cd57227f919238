// Matrix products with a weight. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// out = x weight^T + bias for a decode step's few tokens: a stream over the weight. gated: the weight has the out_size
// rows of a gate and those of up, and out = silu(x gate^T) * (x up^T), rounded once.
struct LinearParams {
    const void* x;       // [num_tokens, in_size], last dimension contiguous
    const void* weight;  // [out_size, in_size], or gated [2 * out_size, in_size]; last dimension contiguous
    const void* bias;    // [out_size], or null; gated: null
    void* out;           // [num_tokens, out_size], last dimension contiguous
    int64_t num_tokens, in_size, out_size;
    int64_t x_token_stride, weight_row_stride, out_token_stride;  // elements
    bool constant_weight;  // no kernel before this one in its stream writes the weight: it may be read early
    bool gated;
    DType dtype;
};

inline constexpr int64_t kLinearMaxTokens = 16;

void linear_cuda(const LinearParams& p, void* stream);
void linear_cpu(const LinearParams& p);

// out = x weight^T + bias + residual on tensor cores, for any number of tokens, of bytes with scales, and on Hopper of
// bf16 and fp16. channel: a scale a token, and one a row of the weight or one for all of it; block: one for 128
// neighbours of a token, and one for 128 x 128 of the weight. gated: the weight has the out_size rows of a gate and
// those of up, and out = silu(gate) * up. Sums are finished in fp32 and rounded once: to out's type, or with an
// out_scale to bytes.
enum class MatmulScales : int8_t { none, channel, block };

struct MatmulParams {
    // rows: of the weight, out_size, or gated twice that
    const void* x;               // [num_tokens, in_size], last dimension contiguous
    const void* weight;          // [rows, in_size], last dimension contiguous
    const float* x_scales;       // channel: [num_tokens]; block: [num_tokens, in_size / 128], contiguous
    const float* weight_scales;  // channel: [rows], or [1]; block: [ceil(rows / 128), in_size / 128], contiguous
    const int32_t* x_zeros;      // of int8: [num_tokens], what x has too much, or null: 0
    const int32_t* weight_sums;  // with x_zeros: [rows], what the rows of weight add up to
    const void* bias;            // [out_size] of bias_dtype, or null; gated: null
    const void* residual;    // [num_tokens, out_size] of bias_dtype, last dimension contiguous, or null; may be out;
                             // gated: null
    const float* out_scale;  // [1]: out is bytes, the values over this, saturated; or null
    void* out;               // [num_tokens, out_size], last dimension contiguous
    void* workspace;         // matmul_workspace_bytes(), zero before the first call, which leaves it to the next
    int64_t num_tokens, in_size, out_size;
    int64_t x_token_stride, weight_row_stride, out_token_stride, residual_token_stride;  // elements
    int64_t num_weight_scales;
    bool constant_weight;  // as in LinearParams
    bool gated;            // linear's kernel has it without scales alone
    MatmulScales scales;
    // Of x and weight, which is e4m3 where x is e5m2; of bias and residual, bf16 or fp16 (linear's kernel takes out's);
    // of out, the same, or with an out_scale e4m3 or int8.
    DType dtype, bias_dtype, out_dtype;
    int tactic;  // 0 to kNumMatmulTactics - 1, or -1: chosen by shape
};

constexpr int64_t weight_rows(const MatmulParams& p) {
    return p.gated ? 2 * p.out_size : p.out_size;
}
// Whether all that is left to do with sums is what every kernel does.
constexpr bool is_plain(const MatmulParams& p) {
    return !p.gated && p.residual == nullptr && p.out_scale == nullptr;
}

inline constexpr int kNumMatmulTactics = 23;

// With zero points all of a sum, (x - zero) * weight, is to fit an int32.
inline constexpr int64_t kMaxInSizeWithZeros = 1 << 16;

// Counters, then partial sums, of the calls of one stream.
inline constexpr int64_t kMatmulCounterBytes = 16384;

constexpr int64_t matmul_workspace_bytes(int num_sms) {
    return kMatmulCounterBytes + int64_t{num_sms} * 2 * 128 * 256 * 4;
}

int64_t matmul_needs_bytes();  // of workspace, on the current device
void matmul_cuda(const MatmulParams& p, void* stream);

// Formats of a quantised weight. int8: two's complement. int4, e2m1: two neighbours of a row in a byte, the first in
// the low half; int4 is unsigned, and stands for itself less its zero point.
enum class WeightType : int8_t { int8, int4, e2m1, e4m3 };
// fp32, fp16, bf16, fp8 e4m3, or an exponent, 2^(byte - 127)
enum class ScaleType : int8_t { f32, f16, bf16, e4m3, e8m0 };
// What x is rounded to before the product: nothing, or bytes with a scale a token or 128 elements (byte_scales.h), or
// with a scale and a zero point a token.
enum class Activation : int8_t { none, int8_token, e4m3_token, e4m3_block, int8_zeros, e5m2_token };

// out = x W^T + bias for any number of tokens; W[n][k] = global_scale * scale * (weight - zero), where block_rows x
// block_size neighbours share a scale. scale_rows = ceil(out_size / block_rows), scale_size = ceil(in_size /
// block_size).
struct QuantizedLinearParams {
    const void* x;               // [num_tokens, in_size] of dtype, last dimension contiguous
    const uint8_t* weight;       // [out_size, in_size], or [out_size, in_size / 2] of 4 bits, contiguous
    const void* scales;          // [scale_rows, scale_size] of scale_type, contiguous
    const uint8_t* zeros;        // int4: [out_size, scale_size], contiguous; null: all 8
    const float* global_scale;   // [1], or null: 1
    const int32_t* weight_sums;  // int8_zeros: [out_size], what the rows of weight add up to
    const void* bias;            // [out_size] of dtype, or null
    void* out;                   // [num_tokens, out_size] of dtype, last dimension contiguous
    int64_t num_tokens, in_size, out_size;
    int64_t x_token_stride, out_token_stride;  // elements
    int64_t block_rows, block_size;
    bool interleaved;  // weight is as interleave_rows leaves it
    WeightType weight_type;
    ScaleType scale_type;
    Activation activation;
    DType dtype;
};

// Rows in the order one token reads them: 8 rows take turns by 64 bytes; what is left over of the rows stays.
struct InterleaveParams {
    const uint8_t* rows;  // [num_rows, row_bytes], contiguous
    uint8_t* out;         // the same size
    int64_t num_rows, row_bytes;
};

inline constexpr int64_t kInterleavedRows = 8, kInterleavedBytes = 64;

void interleave_rows_cpu(const InterleaveParams& p);

inline constexpr int64_t kQuantizedMaxInSize = 1 << 17;  // int32 holds as many products of two bytes

void integer_linear_cpu(const QuantizedLinearParams& p);  // int8, int4, e2m1
void fp8_linear_cpu(const QuantizedLinearParams& p);      // e4m3

// Weights that were repacked for the GPU's tensor cores (gemm/weight_only.h); of int4, gN is the size of a group.
enum class PackedFormat : int8_t {
    int4_g128,
    int4_g64,
    int4_g32,
    int4_g128_zeros,
    int4_g64_zeros,
    int4_g32_zeros,
    int8,
    e4m3,
    e4m3_block,
    nvfp4,
    mxfp4,
    int4_e4m3_g128,  // for x in e4m3; the others are for x as it is
    int4_e4m3_g64,
    int4_e4m3_g32,
};
inline constexpr int kNumPackedFormats = 14;

// Whether a format's products take x in e4m3 with a scale a token.
constexpr bool takes_e4m3(PackedFormat format) {
    return format >= PackedFormat::int4_e4m3_g128;
}

// out = x W^T + bias for any number of tokens, x as it is or, by the format, in e4m3.
struct WeightOnlyParams {
    const void* x;             // [num_tokens, in_size], last dimension contiguous, rows aligned to 16 bytes
    const float* x_scales;     // of e4m3: [num_tokens]; else null
    const uint8_t* packed;     // the units of gemm/weight_only.h
    const float* row_factors;  // [out_size]: what a row's sum is multiplied by
    const void* bias;          // [out_size], or null
    void* out;                 // [num_tokens, out_size], last dimension contiguous
    int64_t num_tokens, in_size, out_size;
    int64_t x_token_stride, out_token_stride;  // elements
    PackedFormat format;
    int tactic;            // 0: chosen by shape; else one of 1 to kWeightOnlyTactics
    bool constant_weight;  // no kernel before this one in its stream writes packed: it may be read early
    DType dtype;           // of bias and out, and of x where that is not e4m3
};

// The first tactics are how many blocks share K, as a cluster, in the kernel for few tokens; the others, Hopper's, are
// the tiles of gemm/weight_only_sm90.h.
inline constexpr int kWeightOnlyFewTactics = 2;
inline constexpr int kWeightOnlyTactics = 17;

int64_t packed_bytes(PackedFormat format, int64_t out_size, int64_t in_size);
void weight_only_linear_cuda(const WeightOnlyParams& p, void* stream);

}  // namespace fastkernels
