// Weights in 4 and 8 bits with x as it is, or of int4 in e4m3: what is taken, and which file has the format.
#include "common/launch.h"
#include "gemm/weight_only.h"
#include "gemm/weight_only_sm90.h"

namespace fastkernels {

namespace {

void run(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.format) {
        case PackedFormat::int4_g128:
        case PackedFormat::int4_g64:
        case PackedFormat::int4_g32: return weight_only_int4(p, sides, stream);
        case PackedFormat::int4_g128_zeros:
        case PackedFormat::int4_g64_zeros:
        case PackedFormat::int4_g32_zeros: return weight_only_int4_zeros(p, sides, stream);
        case PackedFormat::int8:
        case PackedFormat::e4m3:
        case PackedFormat::e4m3_block: return weight_only_byte(p, sides, stream);
        // Blackwell's tensor cores multiply these two as they are, scales included (tcgen05.mma, block_scale): its
        // kernel, with x rounded to the same format, would be asked for here.
        case PackedFormat::nvfp4:
        case PackedFormat::mxfp4: return weight_only_fp4(p, sides, stream);
        case PackedFormat::int4_e4m3_g128:
        case PackedFormat::int4_e4m3_g64:
        case PackedFormat::int4_e4m3_g32: return weight_only_int4_e4m3(p, sides, stream);
        default:
            fail("weight_only_linear: format ", static_cast<int>(p.format), " is none of 0 to ", kNumPackedFormats - 1);
    }
}

}  // namespace

int64_t packed_bytes(PackedFormat format, int64_t out_size, int64_t in_size) {
    return (out_size + kUnitRows - 1) / kUnitRows * ((in_size + kUnitSize - 1) / kUnitSize) * unit_bytes(format);
}

void weight_only_linear_cuda(const WeightOnlyParams& p, void* stream) {
    if (p.num_tokens == 0 || p.out_size == 0) {
        return;
    }
    const int whole = takes_e4m3(p.format) ? 16 : 8;
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.packed);
    check(address % 16 == 0 && p.in_size % whole == 0 && p.x_token_stride % whole == 0,
          "weight_only_linear: x and packed must be aligned to 16 bytes, and in_size and the stride of x multiples of ",
          whole);
    check(p.tactic >= 0 && p.tactic <= kWeightOnlyTactics, "weight_only_linear: tactic is ", p.tactic,
          ", but there are 1 to ", kWeightOnlyTactics, ", and 0 chooses");
    if (p.tactic == 0 && weight_only_sm90_runs() && weight_only_sm90_split(p, stream)) {
        return;
    }
    const int tactic = p.tactic > 0 || !weight_only_sm90_runs() ? p.tactic : weight_only_sm90_tactic(p);
    if (tactic > kWeightOnlyFewTactics) {
        check(weight_only_sm90_runs(), "weight_only_linear: tactic is ", tactic, ", but those from ",
              kWeightOnlyFewTactics + 1, " on are for Hopper GPUs (sm_90a), and for builds with its architecture");
        const WeightOnlyTile& tile = kWeightOnlyTiles[tactic - kWeightOnlyFewTactics - 1];
        check(has_weight_tile(p.format, tile.tokens), "weight_only_linear: tactic is ", tactic, ", tiles of ",
              tile.tokens, " tokens, which this format has not");
        return weight_only_sm90(p, tile, stream);
    }
    run(p, {}, stream);
}

void token_weight_only_linear_cuda(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    if (p.out_size == 0) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.packed) |
                         reinterpret_cast<uintptr_t>(sides.norm.weight);
    check(p.num_tokens == 1 && !takes_e4m3(p.format) && p.tactic >= 0 && p.tactic <= kWeightOnlyFewTactics,
          "token_weight_only_linear: the op takes one token, x as it is, and tactics up to ", kWeightOnlyFewTactics);
    check(
        address % 16 == 0 && p.in_size % 8 == 0,
        "token_weight_only_linear: x, norm_weight and packed must be aligned to 16 bytes, and in_size a multiple of 8");
    check(!sides.gated || p.out_size % kUnitRows == 0, "token_weight_only_linear: out_size is ", p.out_size,
          "; where gate and up are multiplied it must be a multiple of ", kUnitRows);
    run(p, sides, stream);
}

}  // namespace fastkernels
