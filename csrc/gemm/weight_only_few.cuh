// out = x W^T + bias for up to 8 tokens, with W in 4 or 8 bits and x as it is, or of int4 in e4m3, at the speed of
// reading W.
//
//   x [num_tokens, K] bf16 | fp16, or e4m3 with x_scales [num_tokens]   W in units of 16 rows x 128 (weight_only.h)
//   bias [N]   out [num_tokens, N]   bf16 | fp16
//
// A block of up to 16 warps owns whole tiles of 16 rows, as many as there are for every SM, and all of K, or half of
// it, which it shares with the other block of its cluster. A chunk of 128 along K belongs to one warp: it reads x once,
// and multiplies the chunk's units of all tiles one after the other (weight_only_digits.cuh, weight_only_pairs.cuh).
// Their sums lie in shared memory, a warp's own, so that a unit is a short loop with few registers; they are added at
// the end, in the order of the warps, then of the cluster's blocks. Tiles whose sums do not fit go in groups, each with
// x anew.
//
// W comes through a ring of units a warp (cp.async), which is filled before the kernel before this one ends. A block
// has an SM for itself: beside one of the product before it, its loads would delay the small kernels between the two.
//
// Of one token also what stands about the product in a decode step (token_linear.h). The norm: a warp multiplies a
// chunk of x by the norm's weight as it makes operands of it, and the rms comes behind the product, of the squares that
// the warps have added up; in fp16, where that could overflow, every block adds up all of x before. The addition: a
// thread reads what its first result is added to at the begin. The gate: up has as many tiles behind it, and a block
// owns the same of both, in turn.
//
// Bytes: W and its scales once; x once a block and group, from L2.
#pragma once

#include <algorithm>

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/cp_async_4.cuh"
#include "common/ptx/load_16.cuh"
#include "common/ptx/load_4_8.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "common/reduce.cuh"
#include "gemm/weight_only.h"
#include "gemm/weight_only_formats.cuh"
#include "gemm/weight_only_room.h"

namespace fastkernels {
namespace {

constexpr int kFewWarps = 16;  // of a block, at most

struct FewArgs {
    WeightOnlyParams p;
    TokenSides sides;       // of one token
    int splits;             // blocks of a cluster, which share K: 1 or 2
    int split_chunks;       // of the first of them
    int tiles, more_tiles;  // of out, of a cluster; the first more_tiles clusters have one more
    int group_tiles;        // of the weight, at most; of gate and up as many
};

// 8 neighbours of x / rms, times the norm's weight.
template <typename T>
__device__ __forceinline__ uint4 normalised(const uint4& x, const uint4& weight, float factor) {
    float a[8], b[8];
    to_floats(reinterpret_cast<const Vec<T, 8>&>(x), a);
    to_floats(reinterpret_cast<const Vec<T, 8>&>(weight), b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        a[i] = a[i] * factor * b[i];
    }
    const Vec<T, 8> y = from_floats<T>(a);
    return reinterpret_cast<const uint4&>(y);
}

template <typename T>
__device__ __forceinline__ float sum_of_squares(const uint4& x) {
    float a[8], sum = 0.0f;
    to_floats(reinterpret_cast<const Vec<T, 8>&>(x), a);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sum = fmaf(a[i], a[i], sum);
    }
    return sum;
}

// Of an index of [...][8 of g][row g, row g + 8].
__device__ __forceinline__ int row_in_tile(int index) {
    return index % 2 * 8 + index % kUnitRows / 2;
}

template <typename F>
constexpr int kFewUnitBytes = F::kPieces * 512 + F::kScaleBytes;

// Of x in e4m3, that a block keeps.
template <typename Product>
constexpr int kFewTokenScales = kTakesE4m3<typename Product::Format> ? Product::kTokens : 0;

// Product has
//   Element, of x and out or, where x is e4m3, of out; Format
//   kTokens: at most
//   kEarly: whether the next kernel's blocks may come at once, or when W is read
//   kLaneTokens: of them, whose sums a lane has: token t * kLaneTokens + e, rows g and g + 8
//   slot_bytes: what a warp needs for x of a chunk
//   put: 8 neighbours a lane, of two tokens, half a warp each, to the slot
//   load: what a lane needs of the slot
//   multiply: a unit; adds to the lane's sums
template <typename Product, int kSlots>
__global__ void __launch_bounds__(kFewWarps * 32, 1) weight_only_few_kernel(const FewArgs args) {
    using T = typename Product::Element;
    using F = typename Product::Format;
    constexpr int kUnitBytes = kFewUnitBytes<F>, kDataBytes = F::kPieces * 512, kRingBytes = kSlots * kUnitBytes;
    constexpr int kLoads = Product::kTokens / 2;  // of x, each of two tokens
    constexpr int kLaneTokens = Product::kLaneTokens;
    extern __shared__ __align__(16) char shared[];
    const WeightOnlyParams& p = args.p;
    const TokenSides& sides = args.sides;
    const void* const norm = kTakesE4m3<F> ? nullptr : sides.norm.weight;
    const int gated = sides.gated ? 1 : 0;
    const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // known to be the same in all lanes
    const int g = lane / 4, t = lane % 4, my_piece = own_piece<F>(lane);
    const int in_size = static_cast<int>(p.in_size), num_tokens = static_cast<int>(p.num_tokens);

    // This block's tiles of 16 rows, and its chunks of K, of which this warp has every warps-th.
    const int splits = args.splits, cluster = static_cast<int>(blockIdx.x) >> (splits - 1);
    const int rank = static_cast<int>(blockIdx.x) & (splits - 1), group_tiles = args.group_tiles;
    const int first_tile = cluster * args.tiles + min(cluster, args.more_tiles);
    const int my_tiles = (args.tiles + (cluster < args.more_tiles ? 1 : 0)) << gated;  // of the weight
    const int all_chunks = (in_size + kUnitSize - 1) / kUnitSize, first_chunk = rank * args.split_chunks;
    const int num_chunks = min(all_chunks - first_chunk, args.split_chunks);
    const int my_chunks =
        static_cast<int>(static_cast<unsigned>(num_chunks - warp + warps - 1) / static_cast<unsigned>(warps));

    char* ring = shared + warp * kRingBytes;
    char* slot = shared + warps * kRingBytes + warp * Product::slot_bytes(num_tokens);
    float* sums = reinterpret_cast<float*>(shared + warps * (kRingBytes + Product::slot_bytes(num_tokens)));
    // Of a warp: [group_tiles][token][8 of g][row g, row g + 8]
    const int tile_floats = num_tokens * kUnitRows, warp_floats = group_tiles * tile_floats;
    float* factors = sums + warps * warp_floats;                         // [my_tiles][16]
    float* squares = factors + ((args.tiles + 1) << gated) * kUnitRows;  // [warps], of x
    float* token_scales = squares + kFewWarps;                           // of x in e4m3
    float* kept = token_scales + kFewTokenScales<Product>;  // [my_tiles][token][8 of g][2], where a cluster shares K

    // --- Fetching, unit by unit: tiles of a group, my chunks, groups -------------------------------------------------
    const int tile_stride = all_chunks * kUnitBytes, chunk_stride = warps * kUnitBytes;
    // From a tile of the gate to that of up, which is an odd one, and on.
    const int64_t to_odd = gated ? p.out_size / kUnitRows * tile_stride : tile_stride;
    const int64_t to_even = gated ? tile_stride - to_odd : tile_stride;
    const uint8_t* from = p.packed + (int64_t{first_tile} * all_chunks + first_chunk + warp) * kUnitBytes + lane * 16;
    int tiles_left = my_chunks > 0 ? my_tiles : 0;                           // from the group on that is being fetched
    int chunks_left = my_chunks, units_left = min(tiles_left, group_tiles);  // of that group, of that chunk
    const auto fetch = [&](const char* to) {
        if (units_left > 0) {
            const uint32_t fill = shared_address(to) + lane * 16;
#pragma unroll
            for (int i = 0; i < F::kPieces; ++i) {
                cp_async_16(fill + i * 512, from + i * 512, true);
            }
            if (lane < F::kScaleBytes / 16) {
                cp_async_16(fill + kDataBytes, from + kDataBytes, true);
            }
            from += units_left % 2 == 0 ? to_odd : to_even;  // gate and up are both left
            if (--units_left == 0) {
                const int count = min(tiles_left, group_tiles), passed = (count >> gated) * tile_stride;
                from += chunk_stride - passed;
                if (--chunks_left == 0) {
                    from += passed - my_chunks * chunk_stride;
                    tiles_left -= count;
                    chunks_left = my_chunks;
                }
                units_left = min(tiles_left, group_tiles);
            }
        }
        cp_async_commit();
    };
    if constexpr (Product::kEarly) {
        pdl_launch_dependents();
    }
    if (!p.constant_weight) {
        pdl_wait();
    }
    // Before the weight, which memory is busy with for long: the norm's weight and the factors, which are as constant.
    const auto k_of = [&](int index) { return (first_chunk + warp + index * warps) * kUnitSize + lane % 16 * 8; };
    uint4 norm_coming{};
    const auto load_norm = [&](int index) {
        if (norm != nullptr && k_of(index) < in_size) {
            norm_coming = load_16_here(static_cast<const T*>(norm) + k_of(index));
        }
    };
    if (norm != nullptr) {
        if (my_chunks > 0) {
            load_norm(0);
        }
        for (int k = threadIdx.x * 64; k < in_size; k += static_cast<int>(blockDim.x) * 64) {
            prefetch_l2(static_cast<const T*>(norm) + k);
        }
    }
    const auto row_of = [&](int tile) {
        return (static_cast<int64_t>(first_tile) + (tile >> gated)) * kUnitRows + (tile & gated) * p.out_size;
    };
    for (int i = threadIdx.x; i < my_tiles * kUnitRows; i += static_cast<int>(blockDim.x)) {
        const int64_t row = row_of(i / kUnitRows) + i % kUnitRows;
        const bool valid = row < p.out_size << gated;
        cp_async_4(shared_address(factors + i), p.row_factors + (valid ? row : 0), valid);
    }
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) {
        fetch(ring + i * kUnitBytes);
    }
    pdl_wait();

    // --- x: half a warp loads a token, 8 neighbours a lane; past the end of K zeros ----------------------------------
    const int token_stride = static_cast<int>(p.x_token_stride);  // fits: 8 tokens of an x not wider than 2^24
    uint4 coming[kLoads];
    const auto load_x = [&](int index) {
        const int k = k_of(index);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int token = i * 2 + lane / 16;
            coming[i] = uint4{};
            if (k < in_size && token < num_tokens) {
                if constexpr (kTakesE4m3<F>) {
                    const uint2 bytes = load_8_here(static_cast<const uint8_t*>(p.x) + (token * token_stride + k));
                    coming[i] = {bytes.x, bytes.y, 0, 0};
                } else {
                    coming[i] = load_16_here(static_cast<const T*>(p.x) + (token * token_stride + k));
                }
            }
        }
    };
    if (my_chunks > 0) {
        load_x(0);
    }
    if (kTakesE4m3<F> && threadIdx.x < num_tokens) {
        token_scales[threadIdx.x] = p.x_scales[threadIdx.x];
    }

    // --- What stands before the product, and what it is added to -----------------------------------------------------
    // bf16 times the norm's weight does not overflow, so rms may come behind the product, of what the warps have read.
    constexpr bool kLate = kIsBf16<T>;
    const auto one_over_rms = [&](float squares_sum) {
        return rsqrtf(squares_sum / static_cast<float>(in_size) + sides.norm.eps);
    };
    float before_product = 1.0f, behind_product = 1.0f, square = 0.0f;
    if (!kLate && norm != nullptr) {
        float sum = 0.0f;
#pragma unroll 2
        for (int k = threadIdx.x * 8; k < in_size; k += static_cast<int>(blockDim.x) * 8) {
            sum += sum_of_squares<T>(load_16_here(static_cast<const T*>(p.x) + k));
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            squares[warp] = sum;
        }
        __syncthreads();
        before_product = one_over_rms(warp_sum(lane < warps ? squares[lane] : 0.0f));
    }
    // Of one token, in the order of kept: a thread's first result is added to what it has in time.
    const auto read_out = [&](int index) {
        const int64_t n = int64_t{first_tile} * kUnitRows + index / kUnitRows * kUnitRows + row_in_tile(index);
        return n < p.out_size ? static_cast<const T*>(p.out)[n] : T{};
    };
    const int first_result = rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    T before{};
    if (sides.adds && first_result < my_tiles * kUnitRows >> gated) {
        before = read_out(first_result);
    }

    // index: [tile of out][token][8 of g][2]; sum_of: of the weight, of an index like kept's
    const auto store = [&](int index, const auto& sum_of) {
        const int row = row_in_tile(index);
        const unsigned tile_token = static_cast<unsigned>(index) / kUnitRows;
        const unsigned tile = tile_token / static_cast<unsigned>(num_tokens), token = tile_token - tile * num_tokens;
        const int64_t n = (static_cast<int64_t>(first_tile) + tile) * kUnitRows + row;
        if (n >= p.out_size) {
            return;
        }
        const auto product = [&](float sum, int of_weight) {
            float factor = factors[of_weight * kUnitRows + row] * (Product::kLeftOut * behind_product);
            if constexpr (kTakesE4m3<F>) {
                factor *= token_scales[token];
            }
            const float y = sum * factor;
            return p.bias == nullptr ? y : y + to_float(static_cast<const T*>(p.bias)[row_of(of_weight) + row]);
        };
        float y = product(sum_of(index + (gated ? tile * kUnitRows : 0)), tile << gated);
        if (gated) {
            const float up = product(sum_of(index + (tile + 1) * kUnitRows), tile * 2 + 1);
            y = __fdividef(y, 1.0f + __expf(-y)) * up;
        }
        if (sides.adds) {
            y = to_float(from_float<T>(y)) + to_float(index == first_result ? before : read_out(index));
        }
        static_cast<T*>(p.out)[token * p.out_token_stride + n] = from_float<T>(y);
    };

    const char* unit = ring;
    for (int group_first = 0; group_first < my_tiles; group_first += group_tiles) {
        const int count = min(my_tiles - group_first, group_tiles);
        for (int index = 0; index < my_chunks; ++index) {
            if (group_first == 0 || my_chunks > 1) {
                __syncwarp();
                if (norm != nullptr) {
                    if (kLate && group_first == 0) {
                        square += sum_of_squares<T>(coming[0]);
                        square = index + 1 < my_chunks ? square : warp_sum(square);
                    }
                    coming[0] = normalised<T>(coming[0], norm_coming, before_product);
                }
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    if (i * 2 < num_tokens) {
                        Product::put(slot, coming[i], i * 2 + lane / 16, lane % 16, num_tokens);
                    }
                }
                load_x(index + 1 < my_chunks ? index + 1 : 0);
                load_norm(index + 1 < my_chunks ? index + 1 : 0);
                __syncwarp();
            }
            typename Product::Chunk chunk;
            Product::load(chunk, slot, g, t, num_tokens);
            float2* my_sums = reinterpret_cast<float2*>(sums + warp * warp_floats) + t * (kLaneTokens * 8) + g;
#pragma unroll 1
            for (int r = 0; r < count; ++r) {
                cp_async_wait<kSlots - 2>();
                __syncwarp();
                fetch((unit == ring ? unit + kRingBytes : unit) - kUnitBytes);  // where the unit before this one was
                float2 sum[kLaneTokens];
#pragma unroll
                for (int e = 0; e < kLaneTokens; ++e) {
                    sum[e] = index > 0 && t * kLaneTokens + e < num_tokens ? my_sums[e * 8] : float2{0.0f, 0.0f};
                }
                Product::multiply(sum, chunk, unit, my_piece, g, t);
#pragma unroll
                for (int e = 0; e < kLaneTokens; ++e) {
                    if (t * kLaneTokens + e < num_tokens) {
                        my_sums[e * 8] = sum[e];
                    }
                }
                my_sums += tile_floats / 2;
                unit += kUnitBytes;
                unit = unit == ring + kRingBytes ? ring : unit;
            }
        }

        if constexpr (!Product::kEarly) {
            pdl_launch_dependents();
        }
        // --- The warps' sums -----------------------------------------------------------------------------------------
        cp_async_wait<kSlots - 2>();  // the factors: a warp without chunks has not waited
        if (kLate && lane == 0) {
            squares[warp] = square;
        }
        __syncthreads();
        if (kLate && norm != nullptr && splits == 1) {
            behind_product = one_over_rms(warp_sum(lane < warps ? squares[lane] : 0.0f));
        }
        const int adding_warps = min(warps, num_chunks);
        const int passed = group_first * tile_floats;  // of kept
        const auto sum_of = [&](int index) {
            float y = 0.0f;
#pragma unroll 4
            for (int w = 0; w < adding_warps; ++w) {
                y += sums[w * warp_floats + index - passed];
            }
            return y;
        };
        const int shift = splits > 1 ? 0 : gated, end = (passed + count * tile_floats) >> shift;
        for (int i = (passed >> shift) + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
            if (splits > 1) {
                kept[i] = sum_of(i);
            } else {
                store(i, sum_of);
            }
        }
        if (group_first + group_tiles < my_tiles) {
            __syncthreads();
        }
    }

    // --- The cluster's sums ------------------------------------------------------------------------------------------
    if (splits > 1) {
        cluster_sync();
        if (kLate && norm != nullptr) {
            float sum = 0.0f;
            for (int other = 0; other < splits; ++other) {
                sum += warp_sum(lane < warps ? *in_block(squares + lane, other) : 0.0f);
            }
            behind_product = one_over_rms(sum);
        }
        const int total = my_tiles * tile_floats >> gated, threads = static_cast<int>(blockDim.x);
        for (int i = rank * threads + static_cast<int>(threadIdx.x); i < total; i += splits * threads) {
            store(i, [&](int index) {
                float y = 0.0f;
                for (int other = 0; other < splits; ++other) {
                    y += *in_block(kept + index, other);
                }
                return y;
            });
        }
        cluster_sync();  // no block ends while another reads from it
    }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// False, and nothing is launched, where there is no room: for the sums of all tiles at once, or, if it may be grouped,
// of one.
template <typename Product, int kSlots>
bool launch_few(const WeightOnlyParams& p, const TokenSides& sides, int splits, int most_warps, bool grouped,
                const Room& room, void* stream) {
    const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    const int num_tiles = ceil_div(p.out_size, kUnitRows), all_chunks = ceil_div(p.in_size, kUnitSize);
    const int tokens = static_cast<int>(p.num_tokens), parts = sides.gated ? 2 : 1;  // tiles of the weight for one
    splits = all_chunks > 1 ? splits : 1;
    const int clusters = std::min(num_tiles, std::max(room.num_sms / splits, 1)), tiles = ceil_div(num_tiles, clusters);
    // As many warps as share a block's chunks evenly, and enough to add up.
    const int chunks = ceil_div(all_chunks, splits);
    const int warps = std::max(ceil_div(chunks, ceil_div(chunks, most_warps)), 4);
    const int limit = room.block_bytes;
    const int tile_bytes = tokens * kUnitRows * 4 * parts;
    const int others = warps * (kSlots * kFewUnitBytes<typename Product::Format> + Product::slot_bytes(tokens)) +
                       (num_tiles / clusters + 1) * parts * kUnitRows * 4 + kFewWarps * 4 +
                       kFewTokenScales<Product> * 4 + (splits > 1 ? tiles * tile_bytes : 0);
    const int fit = std::min(std::max(limit - others, 0) / (warps * tile_bytes), tiles);
    if (fit == 0 || (!grouped && fit < tiles)) {
        return false;
    }
    // All that a block may have: with less the split between L1 and shared memory would change from product to product,
    // for which an SM has to be empty, and other products' blocks would come beside this one.
    launch(weight_only_few_kernel<Product, kSlots>,
           {.grid = dim3(static_cast<unsigned>(clusters * splits)),
            .block = dim3(static_cast<unsigned>(warps * 32)),
            .shared_bytes = static_cast<size_t>(limit),
            .pdl = true,
            .cluster = static_cast<unsigned>(splits)},
           stream,
           FewArgs{p, sides, splits, chunks, num_tiles / clusters, num_tiles % clusters,
                   ceil_div(tiles, ceil_div(tiles, fit)) * parts});
    return true;
}

// As many slots as leave room for all sums at once, or enough to keep memory busy; on GPUs with less shared memory the
// last way has room enough for 8 tokens.
template <typename Product>
void launch_few(const WeightOnlyParams& p, const TokenSides& sides, int splits, const Room& room, void* stream) {
    constexpr bool kIsByte = Product::Format::kPieces == 4;
    constexpr int kMany = kIsByte ? 4 : 9, kSome = kIsByte ? 3 : 4;
    if (!launch_few<Product, kMany>(p, sides, splits, kFewWarps, false, room, stream) &&
        !launch_few<Product, kSome>(p, sides, splits, kFewWarps, true, room, stream) &&
        !launch_few<Product, 2>(p, sides, splits, kFewWarps / 2, true, room, stream)) {
        fail("weight_only_linear: a block has no room for the sums of ", p.num_tokens, " tokens and ", p.out_size,
             " rows");
    }
}

}  // namespace
}  // namespace fastkernels
