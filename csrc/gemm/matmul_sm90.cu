// The launcher of matmul_sm90: the tensor maps, the tactic, the schedule.
#include <cuda_fp8.h>

#include <algorithm>

#include "common/dtype.cuh"
#include "common/hopper.cuh"
#include "common/ptx/tma_halves.cuh"
#include "common/ptx/tma_panel.cuh"
#include "gemm/linear_bytes.h"
#include "gemm/matmul_sm90.h"

namespace fastkernels {
namespace {

constexpr int64_t kLateBytes = 40 << 20;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

MatmulSchedule schedule_of(const MatmulParams& p, const MatmulTile& tile, bool split, int sms) {
    const int64_t a_rows = tile.tokens_are_a ? p.num_tokens : weight_rows(p);
    const int64_t b_rows = tile.tokens_are_a ? weight_rows(p) : p.num_tokens;
    const int64_t row_bytes = p.in_size * static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t a_tiles = ceil_div(a_rows, kMatmulRows * tile.cluster), b_tiles = ceil_div(b_rows, tile.columns);
    check(a_tiles * b_tiles < int64_t{1} << 24, "matmul: ", p.num_tokens, " tokens x ", p.out_size,
          " are more tiles than the kernel counts");
    const int group = 2048 / (kMatmulRows * tile.cluster);  // what 132 SMs read of A and B is then about the same
    const MatmulCut cut = !split ? MatmulCut::none : tile.tokens_are_a ? MatmulCut::slices : MatmulCut::stream_k;
    const int64_t chunks = ceil_div(row_bytes, 128);
    check(2 * sms * chunks < int64_t{1} << 31, "matmul: in_size is ", p.in_size, ", more than the kernel counts");
    return matmul_schedule(static_cast<int>(a_tiles), static_cast<int>(b_tiles), static_cast<int>(chunks),
                           std::max(1, sms / tile.cluster), group, cut);
}

// What a tactic should take on an H200, in us. The constants were fitted to 928 timings (docs/kernels/gemm.md), of
// which this rule's choices are 0.7% off the best in geometric mean.
double predicted_us(const MatmulParams& p, const MatmulTile& tile, bool split, int sms) {
    constexpr double kLargestChunk = 0.629;  // us of 128 x 256: the tensor cores at full power
    constexpr double kFromL2 = 71e3;         // bytes an SM and us
    constexpr double kMemory = 4.15e6;       // bytes a us
    const double bytes = static_cast<double>(size_bytes(p.dtype));
    const MatmulSchedule s = schedule_of(p, tile, split, sms);
    const double of_largest = tile.columns / 256.0;
    const int rounds = static_cast<int>(ceil_div(s.tiles(), s.workers));
    double busiest = 0, more = 1;  // of a worker, in whole tiles
    double chunk = 128.0 * (kMatmulRows + static_cast<double>(tile.columns) / tile.cluster) / kFromL2;
    double per_tile = of_largest;
    if (tile.tokens_are_a) {
        const bool promotes = p.dtype == DType::e4m3 && tile.columns < 256;
        chunk = kLargestChunk * of_largest * (tile.columns == 128 ? 1.11 : 1) *
                (p.scales == MatmulScales::block ? 1.33
                 : promotes                      ? 1.04
                                                 : 1);
        per_tile = 2.7 * of_largest;
    }
    if (s.slices > 0) {
        const int whole = s.tiles() / s.workers,
                  slices = static_cast<int>(ceil_div(s.split_tiles * s.slices, s.workers));
        busiest = whole + static_cast<double>(slices) / s.slices;
        per_tile *= (whole + slices) / busiest;
        more += 4.7 + 1.8 * of_largest * s.slices;
    } else if (s.split_tiles > 0) {
        busiest = static_cast<double>(s.tiles()) / s.workers;
        per_tile *= rounds / busiest;
        more += 5 + 8 * of_largest;
    } else {
        busiest = rounds;
    }
    const double memory =
        (weight_rows(p) * p.in_size * bytes + p.num_tokens * (p.in_size * bytes + p.out_size * 2.0)) / kMemory;
    return std::max(busiest * (s.chunks * chunk + per_tile), memory) + more;
}

MatmulSchedule schedule_of(const MatmulParams& p, const MatmulFewTile& tile) {
    const int64_t row_bytes = p.in_size * static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t a_tiles = ceil_div(weight_rows(p), kMatmulFewRows), b_tiles = ceil_div(p.num_tokens, tile.columns);
    check(a_tiles * b_tiles < int64_t{1} << 24, "matmul: ", p.num_tokens, " tokens x ", p.out_size,
          " are more tiles than the kernel counts");
    return {.a_tiles = static_cast<int>(a_tiles),
            .b_tiles = static_cast<int>(b_tiles),
            .chunks = static_cast<int>(ceil_div(row_bytes, 128))};
}

// Where blocks of half an SM are all there at once, clusters that share K are the best for few tokens, since no tile of
// 128 rows is left to cut, but for a K so short that whole tiles are over before a cluster has met. 4 blocks a tile
// where 2 would leave SMs without one, or K is long enough that its loads are most of the time and not the start: then
// more of them are in flight. -1: elsewhere.
int few_tactic(const MatmulParams& p, int sms) {
    constexpr int kLeastChunks = 16, kLongChunks = 64;
    const int64_t tiles = ceil_div(weight_rows(p), kMatmulFewRows);
    const int64_t chunks = ceil_div(p.in_size * static_cast<int64_t>(size_bytes(p.dtype)), 128);
    if (p.num_tokens > 64 || tiles > sms || chunks < kLeastChunks) {
        return -1;
    }
    const bool four = (2 * tiles <= sms && chunks > kLongChunks) || 4 * tiles <= sms;
    return kFirstFewTactic + (p.num_tokens > 32 ? 2 : 0) + (four ? 1 : 0);
}

// A tactic that adds fp8 up in 14 bits is only taken when it is asked for.
int default_tactic(const MatmulParams& p, int sms) {
    if (fits_linear_bytes(p)) {
        return kLinearTactic;
    }
    if (const int few = few_tactic(p, sms); few >= 0) {
        return few;
    }
    if (p.out_size % 8 != 0) {
        return kFirstFewTactic + 2;
    }
    int best = -1;
    double least = 0;
    for (int tactic = 0; tactic < 2 * kNumMatmulTiles; ++tactic) {
        const MatmulTile& tile = kMatmulTiles[tactic / 2];
        // The weight's rows fill the tensor core's where tokens would not.
        const bool fits = tile.tokens_are_a ? p.num_tokens > 64 : p.num_tokens <= 256;
        if (!fits || !has_matmul_tile(tile, p.dtype, p.scales, p.gated) || sums_in_14_bits(tile, p.dtype)) {
            continue;
        }
        const double us = predicted_us(p, tile, tactic % 2 == 1, sms);
        if (best < 0 || us < least) {
            best = tactic;
            least = us;
        }
    }
    return best;
}

// The driver wants whole 16 bytes of a stride that is never used too.
int64_t row_stride_bytes(int64_t rows, int64_t columns, int64_t stride, int64_t element_bytes) {
    return rows > 1 ? stride * element_bytes : ceil_div(columns * element_bytes, 16) * 16;
}

}  // namespace

void matmul_sm90(const MatmulParams& p, void* stream) {
    check(on_hopper(), "matmul: tactics 0 to ", kLinearTactic - 1, " and ", kFirstFewTactic, " to ",
          kFirstFewTactic + kNumMatmulFewTiles - 1,
          ", and bf16 and fp16, are for Hopper GPUs, and for builds with their architecture, sm_90a");
    const int64_t element_bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t x_stride = row_stride_bytes(p.num_tokens, p.in_size, p.x_token_stride, element_bytes);
    const int64_t weight_stride = row_stride_bytes(weight_rows(p), p.in_size, p.weight_row_stride, element_bytes);
    const int64_t out_stride =
        row_stride_bytes(p.num_tokens, p.out_size, p.out_token_stride, static_cast<int64_t>(size_bytes(p.out_dtype)));
    check((x_stride | weight_stride | out_stride) % 16 == 0 && reinterpret_cast<uintptr_t>(p.workspace) % 16 == 0,
          "matmul: x, weight, out and their rows must be aligned to 16 bytes");

    const int sms = num_sms();
    const int tactic = p.tactic < 0 ? default_tactic(p, sms) : p.tactic;
    if (tactic == kLinearTactic) {
        linear_bytes(p, stream);
        return;
    }
    const bool few = tactic >= kFirstFewTactic;
    check(few || p.out_size % 8 == 0, "matmul: out_size is ", p.out_size,
          "; tiles that TMA stores, 16 bytes at a time, want a multiple of 8");
    const MatmulFewTile& few_tile = kMatmulFewTiles[few ? tactic - kFirstFewTactic : 0];
    const MatmulTile& tile = kMatmulTiles[few ? 0 : tactic / 2];
    const bool tokens_are_a = !few && tile.tokens_are_a;
    const int a_rows = few ? kMatmulFewRows : kMatmulRows,
              b_rows = few ? few_tile.columns : tile.columns / tile.cluster;
    check(!p.gated || few || has_matmul_tile(tile, p.dtype, p.scales, true), "matmul: there is no tile ", tactic / 2,
          ", tactics ", tactic / 2 * 2, " and ", tactic / 2 * 2 + 1, ", for a gate and these types");
    const auto type = p.dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                      : p.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const auto operand = [&](const void* matrix, int64_t rows, int64_t stride, int box_rows) {
        return encode(TensorMap2d{.address = matrix,
                                  .type = type,
                                  .element_bytes = static_cast<int>(element_bytes),
                                  .rows = rows,
                                  .columns = p.in_size,
                                  .row_stride_bytes = stride,
                                  .box_rows = box_rows});
    };
    const CUtensorMap x_map = operand(p.x, p.num_tokens, x_stride, tokens_are_a ? a_rows : b_rows);
    const int weight_box = tokens_are_a ? b_rows : a_rows;
    const CUtensorMap weight_map = p.gated ? encode(TensorMapOfHalves{.address = p.weight,
                                                                      .type = type,
                                                                      .element_bytes = static_cast<int>(element_bytes),
                                                                      .half_rows = p.out_size,
                                                                      .columns = p.in_size,
                                                                      .row_stride_bytes = weight_stride,
                                                                      .box_rows = weight_box})
                                           : operand(p.weight, p.out_size, weight_stride, weight_box);
    const bool is_fp16 = p.bias_dtype == DType::f16;
    const MatmulSchedule schedule = few ? schedule_of(p, few_tile) : schedule_of(p, tile, tactic % 2 == 1, sms);
    const auto out_type = p.out_scale != nullptr ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                          : is_fp16              ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const int out_box_rows = tokens_are_a ? 64 : few ? b_rows : tile.columns;
    const int out_bytes = static_cast<int>(size_bytes(p.out_dtype));
    const CUtensorMap out_map = p.gated || p.out_scale != nullptr
                                    ? encode(TensorMapOfPanels{.address = p.out,
                                                               .type = out_type,
                                                               .element_bytes = out_bytes,
                                                               .rows = p.num_tokens,
                                                               .columns = p.out_size,
                                                               .row_stride_bytes = out_stride,
                                                               .panel_bytes = (p.gated ? 32 : 64) * out_bytes,
                                                               .box_rows = out_box_rows})
                                    : encode(TensorMap2d{.address = p.out,
                                                         .type = out_type,
                                                         .element_bytes = out_bytes,
                                                         .rows = p.num_tokens,
                                                         .columns = p.out_size,
                                                         .row_stride_bytes = out_stride,
                                                         .box_rows = out_box_rows});
    const MatmulArgs args{
        .a_map = tokens_are_a ? x_map : weight_map,
        .b_map = tokens_are_a ? weight_map : x_map,
        .out_map = out_map,
        .schedule = schedule,
        .out = p.out,
        .out_token_stride = p.out_token_stride,
        .residual_token_stride = p.residual_token_stride,
        .bias = p.bias,
        .residual = p.residual,
        .out_scale = p.out_scale,
        .token_scales = p.x_scales,
        .weight_scales = p.weight_scales,
        .token_zeros = p.x_zeros,
        .weight_sums = p.weight_sums,
        .partials = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + kMatmulCounterBytes),
        .counters = static_cast<unsigned*>(p.workspace),
        .num_tokens = static_cast<int>(p.num_tokens),
        .out_size = static_cast<int>(p.out_size),
        .rows = static_cast<int>(weight_rows(p)),
        .weight_scale_stride = p.num_weight_scales == 1 ? 0 : 1,
        .out_type = p.out_scale == nullptr       ? MatmulOut::values
                    : p.out_dtype == DType::e4m3 ? MatmulOut::e4m3
                                                 : MatmulOut::int8,
        .constant_weight = p.constant_weight,
        .is_fp16 = is_fp16,
        .gated = p.gated,
        .plain = is_plain(p),
        // A small product is over before loads of the next one help it, and they would delay its own.
        .launch_late = weight_rows(p) * p.in_size * element_bytes < kLateBytes,
    };
    check(schedule.split_tiles * tile.cluster * 2 * static_cast<int64_t>(sizeof(unsigned)) <= kMatmulCounterBytes,
          "matmul: the workspace has no room for the counters of ", schedule.split_tiles, " tiles");
    const int blocks = schedule.workers * tile.cluster;
    const auto run = [&]<typename T, MatmulScales kScales>() {
        check(p.scales == kScales, "matmul: ", name(p.dtype), " does not go with these scales");
        if (few) {
            return matmul_sm90_few<T, kScales>(args, tactic - kFirstFewTactic, stream);
        }
        matmul_sm90_tile<T, kScales>(args, tactic / 2, blocks, stream);
    };
    switch (p.dtype) {
        case DType::bf16: return run.template operator()<bf16, MatmulScales::none>();
        case DType::f16: return run.template operator()<fp16, MatmulScales::none>();
        case DType::i8: return run.template operator()<int8_t, MatmulScales::channel>();
        case DType::e5m2: return run.template operator()<__nv_fp8_e5m2, MatmulScales::channel>();
        case DType::e4m3:
            return p.scales == MatmulScales::block ? run.template operator()<__nv_fp8_e4m3, MatmulScales::block>()
                                                   : run.template operator()<__nv_fp8_e4m3, MatmulScales::channel>();
        default: fail("matmul: dtype ", name(p.dtype), " is not supported: bf16, fp16, e4m3, e5m2 and int8 are");
    }
}

}  // namespace fastkernels
