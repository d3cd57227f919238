// What the launcher of matmul_sm90 hands to its instances, a file a type, and the shapes both need.
#pragma once

#include <cuda.h>

#include "fastkernels/gemm.h"
#include "gemm/matmul_sm90_schedule.h"

namespace fastkernels {

// Tiles of 128 rows of A for each block of a cluster, times `columns` rows of B, which the cluster's blocks share.
struct MatmulTile {
    bool tokens_are_a;  // A is x and B the weight; otherwise the other way round
    int columns;
    int cluster;
};
inline constexpr int kMatmulRows = 128;

// The tactics: tile t with whole tiles is 2t, with some cut along K 2t + 1. Then linear's kernel for few tokens, and
// the tiles of matmul_sm80.h, which are for any GPU.
inline constexpr MatmulTile kMatmulTiles[] = {
    {true, 256, 2}, {true, 256, 1}, {true, 192, 2}, {true, 128, 2},
    {true, 128, 1}, {false, 32, 1}, {false, 64, 1}, {false, 128, 2},
};
inline constexpr int kNumMatmulTiles = sizeof(kMatmulTiles) / sizeof(kMatmulTiles[0]);
inline constexpr int kLinearTactic = 2 * kNumMatmulTiles;

// For few tokens, with the weight as A: 64 rows of it times `columns` tokens, K shared out over the blocks of a cluster
// (matmul_sm90_few.cuh). Their tactics come behind those of matmul_sm80.h. All types have all of them.
struct MatmulFewTile {
    int columns;
    int cluster;
    int slots;  // of a block's ring
};
inline constexpr int kMatmulFewRows = 64;
inline constexpr MatmulFewTile kMatmulFewTiles[] = {{32, 2, 8}, {32, 4, 4}, {64, 2, 6}, {64, 4, 4}};
inline constexpr int kNumMatmulFewTiles = sizeof(kMatmulFewTiles) / sizeof(kMatmulFewTiles[0]);
inline constexpr int kFirstFewTactic = kLinearTactic + 3;

// Out as it is stored: the type of bias and residual, or bytes.
enum class MatmulOut : int8_t { values, e4m3, int8 };

constexpr bool is_fp8(DType dtype) {
    return dtype == DType::e4m3 || dtype == DType::e5m2;
}

// Block scales multiply partial sums: beside these there is no room for those of 256 columns, or of 128 columns with a
// scale each. Tiles of 192 columns are the widest that leave fp8 room for both; other types have those of 256. e5m2 has
// one tile a width, of those that add up in fp32.
// A gate and up have scales of blocks of their own, which tiles of 192 have no room for.
constexpr bool has_matmul_tile(const MatmulTile& tile, DType dtype, MatmulScales scales, bool gated = false) {
    const bool by_block = tile.columns <= (!tile.tokens_are_a ? 64 : gated ? 128 : 192);
    const bool fits_e5m2 = tile.columns < 256 && (tile.columns != 128 || tile.cluster == 1);
    return (scales != MatmulScales::block || by_block) && (tile.columns != 192 || is_fp8(dtype)) &&
           (dtype != DType::e5m2 || fits_e5m2);
}

// Whether wgmma adds a whole product of fp8 up by itself, with about 14 bits.
constexpr bool sums_in_14_bits(const MatmulTile& tile, DType dtype) {
    return is_fp8(dtype) && tile.columns == 256;
}

struct MatmulArgs {
    CUtensorMap a_map;  // [rows, in_size] in boxes of 128 rows and 128 bytes; gated, the weight's is of halves
    CUtensorMap b_map;  // the same, of columns / cluster rows
    // [num_tokens, out_size] in boxes of 64 elements, gated 32, and 64 tokens, or columns tokens where x is B
    CUtensorMap out_map;
    MatmulSchedule schedule;
    void* out;  // of few tokens, which are stored without TMA, and its stride
    int64_t out_token_stride, residual_token_stride;
    const void* bias;            // [out_size] bf16 or fp16, or null
    const void* residual;        // [num_tokens, out_size] of the same type, or null
    const float* out_scale;      // [1], where out is bytes
    const float* token_scales;   // channel: [num_tokens]; block: [num_tokens, chunks]
    const float* weight_scales;  // channel: [rows], or one; block: [ceil(rows / 128), chunks]
    const int* token_zeros;      // of int8: [num_tokens], or null: 0
    const int* weight_sums;      // with token_zeros: [rows]
    float* partials;             // [blocks, 2, columns * 128] sums of parts of tiles, as the threads hold them
    unsigned* counters;          // [split_tiles, cluster, 2 warpgroups], zero before and after
    int num_tokens, out_size;
    int rows;                 // of the weight: out_size, or gated twice that
    int weight_scale_stride;  // 0: one for all
    MatmulOut out_type;
    bool constant_weight, is_fp16;  // is_fp16: bias, residual, and out but for bytes; otherwise bf16
    bool gated;
    bool plain;        // no gate, residual nor bytes
    bool launch_late;  // few tokens: dependents come in when all is asked for, not as soon as this kernel may write
};

void matmul_sm90(const MatmulParams& p, void* stream);  // its tactics, linear's, and -1

// T: bf16, fp16, e4m3, e5m2 or int8, of x.
template <typename T, MatmulScales kScales>
void matmul_sm90_tile(const MatmulArgs& args, int tile, int blocks, void* stream);
template <typename T, MatmulScales kScales>
void matmul_sm90_few(const MatmulArgs& args, int tile, void* stream);

}  // namespace fastkernels
