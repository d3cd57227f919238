// The launcher of weight_only_sm90: the tensor map, the schedule, and the rule that chooses.
#include <algorithm>

#include "common/dtype.cuh"
#include "common/ptx/tma.cuh"
#include "gemm/weight_only.h"
#include "gemm/weight_only_sm90.h"

namespace fastkernels {
namespace {

// A build for other GPUs alone leaves the kernels empty.
__global__ void weight_only_hopper_code(int* built) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    *built = 1;
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Who takes which tiles. Blocks take whole rounds of them; what is left is shared out, a tile a cluster, if there are
// as many clusters. in_time: rounds, as long as they take.
struct Rounds {
    int64_t row_tiles, token_tiles, whole_tiles, blocks;
    int cluster;
    double in_time;
};

Rounds rounds_of(const WeightOnlyParams& p, const WeightOnlyTile& tile, int sms) {
    const int64_t row_tiles = ceil_div(p.out_size, kWeightTileRows), token_tiles = ceil_div(p.num_tokens, tile.tokens);
    const int64_t tiles = row_tiles * token_tiles, clusters = sms / tile.cluster, blocks = clusters * tile.cluster;
    check(tiles < int64_t{1} << 28, "weight_only_linear: ", p.num_tokens, " tokens x ", p.out_size,
          " are more tiles than the kernel counts");
    const bool enough_chunks = ceil_div(p.in_size, kUnitSize) >= tile.cluster;
    const int64_t whole = blocks > 0 ? tiles / blocks : 0, rest = tiles - whole * blocks;
    // Clusters of 3 do not all fit the GPU at once, and so do not go round.
    const bool shares =
        tile.cluster > 1 && enough_chunks && rest > 0 && rest <= clusters && (whole == 0 || tile.cluster == 2);
    if (shares) {
        return {row_tiles,      token_tiles,
                whole * blocks, whole == 0 ? rest * tile.cluster : blocks,
                tile.cluster,   static_cast<double>(whole) + 1.0 / tile.cluster};
    }
    const int64_t all = std::min<int64_t>(tiles, sms);
    return {row_tiles, token_tiles, tiles, all, 1, static_cast<double>(ceil_div(tiles, all))};
}

void launch_format(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.format) {
        case PackedFormat::int4_g128:
        case PackedFormat::int4_g64:
        case PackedFormat::int4_g32: return weight_only_sm90_int4(args, tokens, stream);
        case PackedFormat::int4_g128_zeros:
        case PackedFormat::int4_g64_zeros:
        case PackedFormat::int4_g32_zeros: return weight_only_sm90_int4_zeros(args, tokens, stream);
        case PackedFormat::int8:
        case PackedFormat::e4m3:
        case PackedFormat::e4m3_block: return weight_only_sm90_byte(args, tokens, stream);
        case PackedFormat::nvfp4:
        case PackedFormat::mxfp4: return weight_only_sm90_fp4(args, tokens, stream);
        case PackedFormat::int4_e4m3_g128:
        case PackedFormat::int4_e4m3_g64:
        case PackedFormat::int4_e4m3_g32: return weight_only_sm90_int4_e4m3(args, tokens, stream);
        default:
            fail("weight_only_linear: format ", static_cast<int>(args.p.format), " is none of 0 to ",
                 kNumPackedFormats - 1);
    }
}

}  // namespace

bool weight_only_sm90_runs() {
    static const bool built = [] {
        cudaFuncAttributes attributes{};
        return cudaFuncGetAttributes(&attributes, weight_only_hopper_code) == cudaSuccess &&
               attributes.ptxVersion >= 90;
    }();
    return compute_capability() == 90 && built;
}

// By timings of int4 and int4_e4m3 on an H200 (docs/kernels/gemm.md): a chunk of a tile, and what it costs to share
// tiles.
int weight_only_sm90_tactic(const WeightOnlyParams& p) {
    const int sms = num_sms();
    // Up to 8 tokens the other kernel is faster; up to 16 where there are no whole rounds.
    const bool few = p.num_tokens <= 8 || (p.num_tokens <= 16 && p.out_size < int64_t{kWeightTileRows} * sms);
    if (few && !takes_e4m3(p.format)) {
        return 0;
    }
    int best = 0;
    double least = 0;
    for (int i = 0; i < kNumWeightOnlyTiles; ++i) {
        const WeightOnlyTile& tile = kWeightOnlyTiles[i];
        const bool too_few = tile.tokens < 128 && tile.tokens < p.num_tokens;
        if (too_few || (tile.tokens == 256 && p.num_tokens <= 128) || !has_weight_tile(p.format, tile.tokens)) {
            continue;
        }
        const Rounds rounds = rounds_of(p, tile, sms);
        const double chunks = static_cast<double>(ceil_div(p.in_size, kUnitSize));
        const double chunk_us = takes_e4m3(p.format) ? 0.26 + 0.0023 * tile.tokens : 0.38 + 0.0032 * tile.tokens;
        const double share_us = rounds.cluster == 1 ? 0.5 : (rounds.cluster == 2 ? 2.0 : 4.5) + 0.025 * tile.tokens;
        const double us = rounds.in_time * chunks * chunk_us + share_us;
        if (best == 0 || us < least) {
            best = kWeightOnlyFewTactics + 1 + i;
            least = us;
        }
    }
    return best;
}

void weight_only_sm90(const WeightOnlyParams& p, const WeightOnlyTile& tile, void* stream) {
    const Rounds rounds = rounds_of(p, tile, num_sms());
    const bool is_e4m3 = takes_e4m3(p.format);
    const int size = is_e4m3 ? 1 : 2;
    // The driver wants whole 16 bytes of a stride that is never used too.
    const int64_t row_bytes = ceil_div(p.in_size * size, 16) * 16;
    const auto type = is_e4m3                 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                      : p.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const WeightOnlyTileArgs args{
        .x_map = encode(TensorMap2d{.address = p.x,
                                    .type = type,
                                    .element_bytes = size,
                                    .rows = p.num_tokens,
                                    .columns = p.in_size,
                                    .row_stride_bytes = p.num_tokens > 1 ? p.x_token_stride * size : row_bytes,
                                    .box_rows = tile.tokens}),
        .p = p,
        .row_tiles = static_cast<int>(rounds.row_tiles),
        .token_tiles = static_cast<int>(rounds.token_tiles),
        .whole_tiles = static_cast<int>(rounds.whole_tiles),
        .blocks = static_cast<int>(rounds.blocks),
        .cluster = rounds.cluster,
        .wide_out = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.out_token_stride % 8 == 0,
    };
    launch_format(args, tile.tokens, stream);
}

}  // namespace fastkernels
