// What the launcher of weight_only_sm90 hands to its instances, a file a family of formats, and the tiles both know.
#pragma once

#include <cuda.h>

#include "fastkernels/gemm.h"

namespace fastkernels {

// Tiles of 128 rows of the weight times so many tokens, and the blocks of a cluster, which share the K of tiles that
// are no whole round for all SMs.
struct WeightOnlyTile {
    int tokens, cluster;
};
inline constexpr int kWeightTileRows = 128;
inline constexpr WeightOnlyTile kWeightOnlyTiles[] = {
    {16, 1}, {16, 2},  {16, 3},  {32, 1},  {32, 2},  {32, 3},  {64, 1},  {64, 2},
    {64, 3}, {128, 1}, {128, 2}, {128, 3}, {256, 1}, {256, 2}, {256, 3},
};
inline constexpr int kNumWeightOnlyTiles = sizeof(kWeightOnlyTiles) / sizeof(kWeightOnlyTiles[0]);
static_assert(kWeightOnlyTactics == kWeightOnlyFewTactics + kNumWeightOnlyTiles);

// Tiles of 256 tokens leave no room for weights of 8 bits, nor registers for the scales of groups below 128 of e4m3.
constexpr bool has_weight_tile(PackedFormat format, int tokens) {
    switch (format) {
        case PackedFormat::int8:
        case PackedFormat::e4m3:
        case PackedFormat::e4m3_block:
        case PackedFormat::int4_e4m3_g64:
        case PackedFormat::int4_e4m3_g32: return tokens <= 128;
        default: return true;
    }
}

struct WeightOnlyTileArgs {
    CUtensorMap x_map;  // [num_tokens, in_size] in boxes of 128 bytes and a tile's tokens
    WeightOnlyParams p;
    int row_tiles, token_tiles;
    int whole_tiles;  // the first, which blocks take in turn; the others are the clusters', one each
    int blocks, cluster;
    bool wide_out;  // rows of out may be written 16 bytes at a time
};

// Of the current device: whether the kernel runs there.
bool weight_only_sm90_runs();
// The kernel for 9 to 16 tokens and weights of 4 bits. False, and nothing is launched, where that is not what p is, or
// where there is no room for it.
bool weight_only_sm90_split(const WeightOnlyParams& p, void* stream);
// 1 to kWeightOnlyTactics, the fastest by rule; 0: the kernel for few tokens chooses.
int weight_only_sm90_tactic(const WeightOnlyParams& p);
void weight_only_sm90(const WeightOnlyParams& p, const WeightOnlyTile& tile, void* stream);

void weight_only_sm90_int4(const WeightOnlyTileArgs& args, int tokens, void* stream);
void weight_only_sm90_int4_zeros(const WeightOnlyTileArgs& args, int tokens, void* stream);
void weight_only_sm90_byte(const WeightOnlyTileArgs& args, int tokens, void* stream);
void weight_only_sm90_fp4(const WeightOnlyTileArgs& args, int tokens, void* stream);
void weight_only_sm90_int4_e4m3(const WeightOnlyTileArgs& args, int tokens, void* stream);

}  // namespace fastkernels
