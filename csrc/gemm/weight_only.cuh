// out = x W^T + bias with W in 4 or 8 bits and x as it is, on tensor cores (mma.sync m16n8k16, fp32 accumulators), for
// more tokens than weight_only_few.cuh takes; also of int4 with x in e4m3.
//
//   x [num_tokens, K] bf16 | fp16, or e4m3 with x_scales [num_tokens]   W in units of 16 rows x 128 (weight_only.h)
//   bias [N]   out [num_tokens, N]   bf16 | fp16
//
// W is the A operand, tokens are B, 8 a tile. The blocks that run at once share W's tiles of 16 rows evenly; where that
// would leave few rows a block, the blocks of a cluster share K. A block takes its tiles in groups of up to kRowTiles,
// and its warps take the 128-wide chunks of a group in turn, on into the next group: an item is a group's units of one
// chunk. A warp fetches its items into a ring of its own (cp.async, num_stages ahead), so that it waits for no other
// warp until the group's end, where sums meet in shared memory and are added in the order of the warps, then of the
// cluster's blocks.
//
// A lane's 16 bytes of a piece are its operands of four (8 bits: two) mma's, unpacked without a look at other lanes.
// Scales of groups multiply fp32 sums: 4 multiply-adds a tile and group, fewer than pairs would need, and exact. Only
// those of e2m1, which has to be multiplied for its exponent's offset anyway, go to the pairs, exact too. The tokens
// are read from global memory straight into operands, up to a chunk ahead: a block reads all of x (of its part of K)
// once a group. Bytes of x become fp16, which is exact, once for the tiles of a group, and a token's scale multiplies
// its results.
//
// Bytes: W and its scales once; x once a group of kRowTiles * 16 rows, from L1 or L2. Source: none; the layout follows
// from linear.cuh's, the trick with the mantissa from Kim et al. 2022 (Who Says Elephants Can't Run).
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/load_16.cuh"
#include "common/ptx/load_4_8.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "gemm/weight_only.h"
#include "gemm/weight_only_formats.cuh"
#include "gemm/weight_only_pairs.cuh"
#include "gemm/weight_only_room.h"

namespace fastkernels {
namespace {

constexpr int kWeightWarps = 8;
constexpr int kWeightThreads = kWeightWarps * 32;

// --- The kernel ------------------------------------------------------------------------------------------------------

template <typename F, int kTokenTiles, int kRowTiles>
struct WeightShape {
    static constexpr int kDataBytes = F::kPieces * 512;
    static constexpr int kUnitBytes = kDataBytes + F::kScaleBytes;
    static constexpr int kStageBytes = kRowTiles * kUnitBytes;  // of a warp
    static constexpr int kTokens = kTokenTiles * 8;
    // Sums of 16 rows and up to 16 tokens of all warps, twice: one is written while the other is read.
    static constexpr int kMeetTiles = 2;
    static constexpr int kMeetStride = 20;  // floats: no two lanes of a warp write to one bank
    static constexpr int kMeetFloats = kWeightWarps * kMeetTiles * 8 * kMeetStride;
    static constexpr int kMeetBytes = 2 * kMeetFloats * 4;
    static constexpr int kTileBytes = kTokens * kUnitRows * 4;  // of a tile's sums, kept where a cluster shares K

    static int shared_bytes(int num_stages, int kept_tiles) {
        return kWeightWarps * num_stages * kStageBytes + kMeetBytes + kept_tiles * kTileBytes;
    }
};

struct WeightOnlyArgs {
    WeightOnlyParams p;
    int num_stages, num_clusters;
};

// What a lane reads of a token for a step of 32 along K: 8 neighbours, as pairs that are b0 and b1 of the step's two
// mma's, or as bytes, 4 from 4 t and 4 from 16 + 4 t on, which become such pairs.
template <typename F>
using LaneTokens = std::conditional_t<kTakesE4m3<F>, uint2, uint4>;

template <typename T, typename F>
__device__ __forceinline__ void store_sum(const WeightOnlyParams& p, float sum, int64_t token, bool valid, int64_t tile,
                                          int row) {
    const int64_t n = tile * kUnitRows + row;
    if (valid && n < p.out_size) {
        float factor = p.row_factors[n] * F::template kLeftOut<T>;
        if constexpr (kTakesE4m3<F>) {
            factor *= p.x_scales[token];
        }
        float y = sum * factor;
        if (p.bias != nullptr) {
            y += to_float(static_cast<const T*>(p.bias)[n]);
        }
        static_cast<T*>(p.out)[token * p.out_token_stride + n] = from_float<T>(y);
    }
}

template <typename T, typename F, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(kWeightThreads, 1) weight_only_kernel(const WeightOnlyArgs args) {
    using Shape = WeightShape<F, kTokenTiles, kRowTiles>;
    using X = std::conditional_t<kTakesE4m3<F>, uint8_t, T>;
    using Operand = std::conditional_t<kTakesE4m3<F>, fp16, T>;
    constexpr bool kHasSums = F::kScaleSteps > 0;
    // The tokens are read a whole item ahead where there are registers for it, else one step of 32 along K or none.
    constexpr bool kWholeUnits = F::kScaleSteps == 0 || F::kScaleSteps == 4;
    constexpr bool kItemAhead = kTokenTiles <= 2 && kTokenTiles * kRowTiles <= (kWholeUnits ? 16 : 8);
    constexpr bool kStepAhead = !kItemAhead && F::kTokenSteps == 1 && (kTokenTiles <= 4 || !kHasSums);
    constexpr int kAhead = kItemAhead ? 4 : F::kTokenSteps;
    extern __shared__ __align__(16) char shared[];
    const WeightOnlyParams& p = args.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int my_piece = own_piece<F>(lane);
    const int num_stages = args.num_stages, in_size = static_cast<int>(p.in_size);

    // This block's tiles of 16 rows, in groups, and its chunks of K.
    const int rank = cluster_rank(), splits = cluster_size(), cluster = static_cast<int>(blockIdx.x) / splits;
    const int64_t num_tiles = (p.out_size + kUnitRows - 1) / kUnitRows;
    const int64_t first_tile = num_tiles * cluster / args.num_clusters;
    const int my_tiles = static_cast<int>(num_tiles * (cluster + 1) / args.num_clusters - first_tile);
    const int num_groups = (my_tiles + kRowTiles - 1) / kRowTiles;
    const int group_tiles = (my_tiles + num_groups - 1) / max(num_groups, 1);
    const int all_chunks = (in_size + kUnitSize - 1) / kUnitSize;
    const int first_chunk = all_chunks * rank / splits, num_chunks = all_chunks * (rank + 1) / splits - first_chunk;
    const int64_t first_token = static_cast<int64_t>(blockIdx.y) * Shape::kTokens;
    const int num_tokens = static_cast<int>(min(p.num_tokens - first_token, static_cast<int64_t>(Shape::kTokens)));

    char* ring = shared + warp * (num_stages * Shape::kStageBytes);
    float* meet = reinterpret_cast<float*>(shared + kWeightWarps * num_stages * Shape::kStageBytes);
    float* kept = meet + Shape::kMeetBytes / 4;  // [my_tiles][kTokens][16]

    // --- Items: a group and a chunk of it, going by the warps' turns
    // --------------------------------------------------
    struct Item {
        int group, chunk;
    };
    const Item end{num_groups, 0};
    const auto advance = [&](Item& item, int by) {
        item.chunk += by;
        while (item.chunk >= num_chunks && item.group < num_groups) {
            item.chunk -= num_chunks;
            ++item.group;
        }
    };
    Item first = num_chunks > 0 ? Item{0, 0} : end;
    advance(first, warp);

    // --- Fetching ----------------------------------------------------------------------------------------------------
    const int64_t tile_stride = static_cast<int64_t>(all_chunks) * Shape::kUnitBytes;
    const uint8_t* packed = p.packed + (first_tile * all_chunks + first_chunk) * Shape::kUnitBytes + lane * 16;
    // 16-byte pieces of a unit's scales; the lanes copy those of all tiles together.
    constexpr int kScalePieces = std::max(F::kScaleBytes / 16, 1);
    constexpr int kScaleCopies = (kRowTiles * (F::kScaleBytes / 16) + 31) / 32;
    int scale_tile[kScaleCopies + 1], scale_to[kScaleCopies + 1];
    int64_t scale_from[kScaleCopies + 1];
#pragma unroll
    for (int i = 0; i < kScaleCopies; ++i) {
        const int piece = lane + i * 32, at = Shape::kDataBytes + piece % kScalePieces * 16 - lane * 16;
        scale_tile[i] = piece / kScalePieces;
        scale_to[i] = scale_tile[i] * Shape::kUnitBytes + at;
        scale_from[i] = scale_tile[i] * tile_stride + at;
    }
    Item next = first;
    uint32_t fill = shared_address(ring) + lane * 16;
    const uint32_t ring_end = fill + num_stages * Shape::kStageBytes;
    const auto fetch = [&] {
        if (next.group < num_groups) {
            const int tile = next.group * group_tiles, count = min(my_tiles - tile, group_tiles);
            const uint8_t* from = packed + tile * tile_stride + next.chunk * Shape::kUnitBytes;
            const auto fetch_tile = [&](int r) {
#pragma unroll
                for (int i = 0; i < F::kPieces; ++i) {
                    cp_async_16(fill + r * Shape::kUnitBytes + i * 512, from + r * tile_stride + i * 512, true);
                }
            };
            if (count == kRowTiles) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    fetch_tile(r);
                }
            } else {
#pragma unroll 1
                for (int r = 0; r < count; ++r) {
                    fetch_tile(r);
                }
            }
#pragma unroll
            for (int i = 0; i < kScaleCopies; ++i) {
                if (scale_tile[i] < count) {
                    cp_async_16(fill + scale_to[i], from + scale_from[i], true);
                }
            }
            advance(next, kWeightWarps);
        }
        cp_async_commit();
        fill += Shape::kStageBytes;
        if (fill == ring_end) {
            fill -= num_stages * Shape::kStageBytes;
        }
    };
    if (!p.constant_weight) {
        pdl_wait();
    }
    for (int i = 0; i < num_stages; ++i) {
        fetch();
    }
    pdl_wait();
    pdl_launch_dependents();

    // --- The tokens: those past the end repeat the last one and are not written. Past the end of K, where W is zero,
    // the last elements are read again: they are in the sum already, should they be NaN
    // ----------------------------------
    constexpr int kLaneSize = kTakesE4m3<F> ? 4 : F::kTokenSteps * 8;  // neighbours of a lane that lie together
    const X* x = static_cast<const X*>(p.x) + first_token * p.x_token_stride + t * kLaneSize;
    const int last_k = kTakesE4m3<F> ? in_size - 16 : in_size - 8 - t * kLaneSize;
    int token_offset[kTokenTiles];  // fits: num_tokens - 1 tokens of an x that is not wider than 2^24
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        token_offset[n] = min(n * 8 + g, num_tokens - 1) * static_cast<int>(p.x_token_stride);
    }
    LaneTokens<F> tokens[kAhead][kTokenTiles];
    const auto load_tokens = [&](LaneTokens<F>(&to)[kTokenTiles], int chunk, int step) {
        const int begin = (first_chunk + chunk) * kUnitSize;
        if constexpr (kTakesE4m3<F>) {
            const int k0 = min(begin + step * 32, last_k), k1 = min(begin + step * 32 + 16, last_k);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                to[n] = {load_4_here(x + (token_offset[n] + k0)), load_4_here(x + (token_offset[n] + k1))};
            }
        } else {
            const int within = step / F::kTokenSteps * (kLaneSize * 4) + step % F::kTokenSteps * 8;
            const int k = min(begin + within, last_k);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                to[n] = load_16_here(x + (token_offset[n] + k));
            }
        }
    };

    Item item = first;
    if ((kItemAhead || kStepAhead) && item.group < num_groups) {
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            load_tokens(tokens[s], item.chunk, s);
        }
    }
    const char* stage = ring;
    int half = 0;  // of meet
    for (int group = 0; group < num_groups; ++group) {
        float sum[kRowTiles][kTokenTiles][4] = {};
        while (item.group == group) {
            // Copies of this item, all but the newest num_stages - 1.
            switch (num_stages) {
                case 2: cp_async_wait<1>(); break;
                case 3: cp_async_wait<2>(); break;
                default: cp_async_wait<3>(); break;
            }
            __syncwarp();
            Item after = item;
            advance(after, kWeightWarps);
            const int chunk_after = after.group < num_groups ? after.chunk : item.chunk;
            LaneTokens<F> coming[kAhead][kTokenTiles];
            if constexpr (kItemAhead) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    load_tokens(coming[s], chunk_after, s);
                }
            }
            float part[kHasSums ? kRowTiles : 1][kHasSums ? kTokenTiles : 1][4] = {};
            uint4 piece[kRowTiles];
#pragma unroll kAhead
            for (int s = 0; s < 4; ++s) {
                if constexpr (kStepAhead) {
                    load_tokens(coming[0], s < 3 ? item.chunk : chunk_after, (s + 1) % 4);
                } else if constexpr (!kItemAhead) {
                    if (s % kAhead == 0) {
#pragma unroll
                        for (int i = 0; i < kAhead; ++i) {
                            load_tokens(tokens[i], item.chunk, s + i);
                        }
                    }
                }
                uint4 pairs[kTakesE4m3<F> ? kTokenTiles : 1];
                if constexpr (kTakesE4m3<F>) {
#pragma unroll
                    for (int n = 0; n < kTokenTiles; ++n) {
                        pairs[n] = pairs_of_bytes(tokens[s % kAhead][n].x, tokens[s % kAhead][n].y);
                    }
                }
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    const char* unit = stage + r * Shape::kUnitBytes;
                    const char* scales = unit + Shape::kDataBytes;
                    if (F::kPieces == 4 || s % 2 == 0) {
                        piece[r] = *reinterpret_cast<const uint4*>(unit + s * F::kPieces / 4 * 512 + my_piece);
                    }
                    uint32_t row_pair[2];
                    F::template prepare<Operand>(row_pair, scales, s, g, t);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        uint32_t a[4];
                        F::template unpack<Operand>(piece[r], s, j, row_pair, a);
#pragma unroll
                        for (int n = 0; n < kTokenTiles; ++n) {
                            uint32_t b0, b1;
                            if constexpr (kTakesE4m3<F>) {
                                b0 = word_of(pairs[n], j * 2);
                                b1 = word_of(pairs[n], j * 2 + 1);
                            } else if constexpr (F::kTokenSteps == 1) {
                                b0 = word_of(tokens[s % kAhead][n], j * 2);
                                b1 = word_of(tokens[s % kAhead][n], j * 2 + 1);
                            } else {
                                b0 = word_of(tokens[s / 2 * 2 % kAhead][n], s % 2 * 2 + j);
                                b1 = word_of(tokens[(s / 2 * 2 + 1) % kAhead][n], s % 2 * 2 + j);
                            }
                            if constexpr (kHasSums) {
                                mma_m16n8k16<Operand>(part[r][n], a, b0, b1);
                            } else {
                                mma_m16n8k16<Operand>(sum[r][n], a, b0, b1);
                            }
                        }
                    }
                    if constexpr (kHasSums) {
                        if ((s + 1) % F::kScaleSteps == 0) {
                            const float2 scale = F::scale(scales, s / F::kScaleSteps, g);
#pragma unroll
                            for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
                                for (int e = 0; e < 4; ++e) {
                                    sum[r][n][e] += part[r][n][e] * (e < 2 ? scale.x : scale.y);
                                    part[r][n][e] = 0.0f;
                                }
                            }
                        }
                    }
                }
                if constexpr (kStepAhead) {
                    memcpy(tokens, coming, sizeof(tokens));
                }
            }
            if constexpr (kItemAhead) {
                memcpy(tokens, coming, sizeof(tokens));
            }
            __syncwarp();
            fetch();
            stage += Shape::kStageBytes;
            if (stage == ring + num_stages * Shape::kStageBytes) {
                stage = ring;
            }
            item = after;
        }

        // --- The warps' sums, a tile of rows and up to 16 tokens at a time -------------------------------------------
        const int group_first = group * group_tiles, count = min(my_tiles - group_first, group_tiles);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            if (r >= count) {
                break;
            }
#pragma unroll
            for (int n0 = 0; n0 < kTokenTiles; n0 += Shape::kMeetTiles) {
                float* here = meet + half * Shape::kMeetFloats;
                half ^= 1;
#pragma unroll
                for (int n = 0; n < Shape::kMeetTiles; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int token = n * 8 + t * 2 + e % 2, row = g + e / 2 * 8;
                        here[(warp * Shape::kMeetTiles * 8 + token) * Shape::kMeetStride + row] = sum[r][n0 + n][e];
                    }
                }
                __syncthreads();
                const int token = threadIdx.x / kUnitRows, row = threadIdx.x % kUnitRows;
                if (token < Shape::kMeetTiles * 8) {
                    float y = 0.0f;
#pragma unroll
                    for (int w = 0; w < kWeightWarps; ++w) {
                        y += here[(w * Shape::kMeetTiles * 8 + token) * Shape::kMeetStride + row];
                    }
                    const int tile = group_first + r, of_all = n0 * 8 + token;
                    if (splits > 1) {
                        kept[(tile * Shape::kTokens + of_all) * kUnitRows + row] = y;
                    } else {
                        store_sum<T, F>(p, y, first_token + of_all, of_all < num_tokens, first_tile + tile, row);
                    }
                }
            }
        }
    }

    // --- The cluster's sums ------------------------------------------------------------------------------------------
    if (splits > 1) {
        cluster_sync();
        const int total = my_tiles * Shape::kTokens * kUnitRows;
        for (int i = rank * kWeightThreads + static_cast<int>(threadIdx.x); i < total; i += splits * kWeightThreads) {
            float y = 0.0f;
            for (int other = 0; other < splits; ++other) {
                y += *in_block(kept + i, other);
            }
            const int token = i / kUnitRows % Shape::kTokens, tile = i / (kUnitRows * Shape::kTokens);
            store_sum<T, F>(p, y, first_token + token, token < num_tokens, first_tile + tile, i % kUnitRows);
        }
        cluster_sync();  // no block ends while another reads from it
    }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// Blocks that share K: 2 where that makes a warp's work at least a tenth less, counted in units and, for each group it
// begins, one more. Clusters of 4 were slower everywhere on an H200. rows: tiles of 16 of a group.
inline int choose_splits(const WeightOnlyParams& p, const Room& room, int rows) {
    if (room.capability < 90 || p.tactic > 0) {
        return room.capability < 90 ? 1 : p.tactic;
    }
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const auto work = [&](int splits) {
        const int64_t tiles = ceil_div(ceil_div(p.out_size, kUnitRows), std::max(room.num_sms / splits, 1));
        const int64_t chunks = ceil_div(ceil_div(ceil_div(p.in_size, kUnitSize), splits), kWeightWarps);
        return chunks * (tiles + ceil_div(tiles, rows));
    };
    return work(2) * 10 < work(1) * 9 ? 2 : 1;
}

template <typename T, typename F, int kTokenTiles, int kRowTiles>
void launch_weight_only(const WeightOnlyParams& p, int splits, const Room& room, void* stream) {
    using Shape = WeightShape<F, kTokenTiles, kRowTiles>;
    const int64_t num_tiles = (p.out_size + kUnitRows - 1) / kUnitRows;
    const int64_t token_blocks = (p.num_tokens + Shape::kTokens - 1) / Shape::kTokens;
    const int64_t limit = std::min(room.block_bytes, room.sm_bytes - 1024);
    int64_t clusters, kept;
    for (;; splits /= 2) {
        clusters = std::min<int64_t>(num_tiles, std::max(room.num_sms / splits, 1));
        kept = splits > 1 ? (num_tiles + clusters - 1) / clusters : 0;
        if (splits == 1 || (kept < 64 && Shape::shared_bytes(2, static_cast<int>(kept)) <= limit)) {
            break;  // a cluster keeps all its sums until its end
        }
    }
    int num_stages = 4;
    while (num_stages > 2 && Shape::shared_bytes(num_stages, static_cast<int>(kept)) > limit) {
        --num_stages;
    }
    launch(weight_only_kernel<T, F, kTokenTiles, kRowTiles>,
           {.grid = dim3(static_cast<unsigned>(clusters * splits), static_cast<unsigned>(token_blocks)),
            .block = dim3(kWeightThreads),
            .shared_bytes = static_cast<size_t>(Shape::shared_bytes(num_stages, static_cast<int>(kept))),
            .pdl = true,
            .cluster = static_cast<unsigned>(splits)},
           stream, WeightOnlyArgs{p, num_stages, static_cast<int>(clusters)});
}

template <typename T, typename F>
void run_weight_only_more(const WeightOnlyParams& p, const Room& room, void* stream) {
    constexpr int kRows = F::kPieces == 2 ? 4 : 2;  // tiles of rows of a group: about 4 KB of a warp's ring
    const int splits = choose_splits(p, room, kRows);
    if (p.num_tokens <= 16) {
        launch_weight_only<T, F, 2, kRows>(p, splits, room, stream);
    } else if (p.num_tokens <= 32) {
        launch_weight_only<T, F, 4, 4>(p, splits, room, stream);
    } else {
        launch_weight_only<T, F, 8, 2>(p, splits, room, stream);
    }
}

}  // namespace
}  // namespace fastkernels
