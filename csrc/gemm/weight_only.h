// Weights of 4 and 8 bits as csrc/gemm/weight_only_few.cuh, weight_only.cuh and weight_only_sm90.cuh stream them. Made
// by ops.repack_for_cuda.
//
// A unit is 16 rows x 128 neighbours along K: [ceil(N / 16)][ceil(K / 128)] of them, rows and neighbours past the end
// zeros. It begins with 2 (4 bits) or 4 (8 bits) pieces of 512 bytes, 16 a lane: with g = lane / 4 and t = lane % 4,
// at 16 (4 g + (t ^ g / 2)). A lane's words are operands of mma.sync, of pairs of neighbours k, k + 1 of the rows g and
// g + 8:
//   int4:   word 2 j + s of piece u is that of k = 64 u + 32 s + 8 t + 4 j: its four pairs are row g at k, row g + 8 at
//           k, row g at k + 2, row g + 8 at k + 2; pair i in the nibbles 4 i and 4 i + 16 of the word
//   e2m1:   word j of piece u is that of k = 64 u + 16 t + 2 j: row g at k, row g + 8 at k, row g at k + 8, row g + 8
//   at
//           k + 8; the bits are in weight_only_unpack.cuh
//   8 bits: words 2 j and 2 j + 1 of piece u are that of k = 32 u + 8 t + 4 j: two pairs a word, in the bytes row g at
//           k, row g + 8 at k, row g at k + 1, row g + 8 at k + 1; the second word begins at k + 2
// int4_e4m3 is in the order of wgmma of e4m3: its pieces lie in the order of the lanes, 16 lane, and word 2 s + h of
// piece u is that of k = 64 u + 32 s + 16 h + 4 t: in byte i the neighbour k + i, of row g in the low half and of row
// g + 8 in the high one. A weight w of -8 to 7 is 2 w, or where that is negative -2 w - 1: bit 0 is the sign. Then the
// scales of the unit, relative to the rows' factors:
//   int4, int4_e4m3: for every group of 128 (64, 32) neighbours fp16 [8 of g][row g, row g + 8]; behind them all, with
//   zero
//           points, for every group uint8 [8][2] in the same order
//   e4m3_block: fp32, one for the unit, and 12 bytes unused
//   nvfp4:  a byte for every block of 16: [2 of 64 neighbours][8 of g][4 of 16 neighbours][row g, row g + 8]
//   mxfp4:  a byte for every block of 32: [2 of 64 neighbours][8 of g][2 of 32 neighbours][row g, row g + 8]
#pragma once

#include "fastkernels/gemm.h"
#include "fastkernels/token_linear.h"

namespace fastkernels {

constexpr int kUnitRows = 16;
constexpr int kUnitSize = 128;  // neighbours along K

constexpr int unit_bytes(PackedFormat format) {
    switch (format) {
        case PackedFormat::int4_g128: return 1024 + 32;
        case PackedFormat::int4_g64: return 1024 + 64;
        case PackedFormat::int4_g32: return 1024 + 128;
        case PackedFormat::int4_g128_zeros: return 1024 + 48;
        case PackedFormat::int4_g64_zeros: return 1024 + 96;
        case PackedFormat::int4_g32_zeros: return 1024 + 192;
        case PackedFormat::int8: return 2048;
        case PackedFormat::e4m3: return 2048;
        case PackedFormat::e4m3_block: return 2048 + 16;
        case PackedFormat::nvfp4: return 1024 + 128;
        case PackedFormat::mxfp4: return 1024 + 64;
        case PackedFormat::int4_e4m3_g128: return 1024 + 32;
        case PackedFormat::int4_e4m3_g64: return 1024 + 64;
        case PackedFormat::int4_e4m3_g32: return 1024 + 128;
    }
    return 0;
}

// sides: empty, but of one token
void weight_only_int4(const WeightOnlyParams& p, const TokenSides& sides, void* stream);
void weight_only_int4_zeros(const WeightOnlyParams& p, const TokenSides& sides, void* stream);
void weight_only_byte(const WeightOnlyParams& p, const TokenSides& sides, void* stream);
void weight_only_fp4(const WeightOnlyParams& p, const TokenSides& sides, void* stream);
void weight_only_int4_e4m3(const WeightOnlyParams& p, const TokenSides& sides, void* stream);

}  // namespace fastkernels
