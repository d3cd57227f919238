// out = x W^T + bias for 9 to 16 tokens, with W in 4 bits and x as it is, on Hopper.
//
//   x [num_tokens, K]   W in units of 16 rows x 128 (weight_only.h)   bias [N]   out [num_tokens, N]   bf16 | fp16
//
// At 16 tokens a chunk of 128 along K of x is as many bytes as four units, and what reads x once for a few rows reads
// more of x than of W. So the 4 blocks of a cluster share K, and a block, which has an SM, keeps its part of x in
// shared memory for all of the cluster's rows, in pairs of tiles of 16. Its 16 warps share the pairs' chunks evenly, as
// one row of them: a warp begins within a pair and ends within another. Sums stay in registers until the pair or the
// warp's share ends; 16 rows of W are unpacked once for both tiles of 8 tokens (mma.sync m16n8k16, W is A), and 8
// tokens are read once for both tiles of rows.
//
// Who has a pair's first chunk adds what the next warps have of it, in their order, and sends each block of the cluster
// its part of the sums, which that block adds up in the order of the blocks and writes.
//
// W comes through a ring a warp, by bulk copies, filled before the kernel before this one ends.
//
// Bytes: W and its scales once; x once a cluster, from L2. Source: none.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cluster_barrier.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/elect.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/tma.cuh"
#include "gemm/weight_only.h"
#include "gemm/weight_only_formats.cuh"
#include "gemm/weight_only_pairs.cuh"

namespace fastkernels {
namespace {

constexpr int kSplitTokens = 16, kSplitWarps = 16, kSplitThreads = kSplitWarps * 32;
constexpr int kSplitBlocks = 4;  // of a cluster
constexpr int kSplitMostSlots = 4;

struct SplitArgs {
    WeightOnlyParams p;
    int tiles, more_tiles;  // of a cluster; the first more_tiles clusters have one more
    int slots;              // of a warp's ring
    int x_stride;           // bytes of a token in shared memory
};

template <typename F>
struct SplitShape {
    static constexpr int kUnitBytes = F::kPieces * 512 + F::kScaleBytes;
    static constexpr int kSlotBytes = 2 * kUnitBytes;  // a chunk of a pair of tiles
    static constexpr int kTokenTiles = kSplitTokens / 8;
    static constexpr int kSums = 2 * kTokenTiles * 4;  // of a lane
    static constexpr int kPairBytes = kSums * 32 * 4;
    // Tokens lie so that the 8 lanes that read 16 bytes each at a time meet no bank twice.
    static constexpr int kPad = F::kTokenSteps == 1 ? 64 : 16;

    // Of a block with so many tiles, without its ring.
    static int other_bytes(int tiles, int x_stride) {
        return kSplitTokens * x_stride + ((tiles + 1) / 2 + kSplitWarps - 1) * kPairBytes + (tiles + 1) * kUnitRows * 4;
    }
};

template <typename T, typename F>
__global__ void __launch_bounds__(kSplitThreads, 1) weight_only_split_kernel(const SplitArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = SplitShape<F>;
    constexpr int kUnitBytes = Shape::kUnitBytes, kSlotBytes = Shape::kSlotBytes, kSums = Shape::kSums;
    constexpr int kTokenTiles = Shape::kTokenTiles, kShare = kSums / kSplitBlocks;  // sums of a pair for each block
    constexpr bool kScaled = F::kScaleSteps > 0;
    extern __shared__ __align__(128) char shared[];
    __shared__ uint64_t full[kSplitWarps][kSplitMostSlots], head_ready[kSplitWarps], x_ready;
    const WeightOnlyParams& p = args.p;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, my_piece = piece_of_lane(g, t);
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // known to be the same in all lanes
    const int slots = args.slots, in_size = static_cast<int>(p.in_size), num_tokens = static_cast<int>(p.num_tokens);

    // The cluster's tiles, in pairs, and this block's chunks of K.
    const int rank = cluster_rank(), cluster = static_cast<int>(blockIdx.x) / kSplitBlocks;
    const int first_tile = cluster * args.tiles + min(cluster, args.more_tiles);
    const int my_tiles = args.tiles + (cluster < args.more_tiles ? 1 : 0), pairs = (my_tiles + 1) / 2;
    const int all_chunks = (in_size + kUnitSize - 1) / kUnitSize;
    const int first_chunk = all_chunks * rank / kSplitBlocks;
    const int num_chunks = all_chunks * (rank + 1) / kSplitBlocks - first_chunk;
    // This warp's share of pairs x chunks.
    const int units = pairs * num_chunks;
    const auto share_begin = [&](int of_warp) { return units * of_warp / kSplitWarps; };
    const int begin = share_begin(warp), first_pair = begin / num_chunks, begin_chunk = begin - first_pair * num_chunks;
    int left = share_begin(warp + 1) - begin;

    char* ring = shared + kSplitTokens * args.x_stride + warp * slots * kSlotBytes;
    float* sums = reinterpret_cast<float*>(shared + kSplitTokens * args.x_stride + kSplitWarps * slots * kSlotBytes);
    float* heads = sums + pairs * kSums * 32;                    // [warps but the first][kSums][4 of t][8 of g]
    float* factors = heads + (kSplitWarps - 1) * kSums * 32;     // [my_tiles][16]
    const int my_sums = rank * pairs * kShare * 32 + t * 8 + g;  // of sums: [block][pair][kShare][4 of t][8 of g]

    if (elect_one()) {
        for (int i = 0; i < slots; ++i) {
            mbarrier_init(shared_address(&full[warp][i]), 1);
        }
        mbarrier_init(shared_address(&head_ready[warp]), 32);
        if (warp == 0) {
            mbarrier_init(shared_address(&x_ready), kSplitWarps);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_arrive();  // the others may send sums once they have seen this

    // --- Fetching, a chunk of a pair at a time -----------------------------------------------------------------------
    const int64_t tile_stride = static_cast<int64_t>(all_chunks) * kUnitBytes;
    const uint8_t* from = p.packed + (first_tile + first_pair * 2) * tile_stride +
                          static_cast<int64_t>(first_chunk + begin_chunk) * kUnitBytes;
    int to_fetch = left, fetch_pair = first_pair, fetch_chunk = begin_chunk, fill = 0;
    const auto fetch = [&] {
        if (elect_one()) {
            const uint32_t barrier = shared_address(&full[warp][fill]), to = shared_address(ring) + fill * kSlotBytes;
            const bool both = fetch_pair * 2 + 1 < my_tiles;
            mbarrier_arrive_expect_bytes(barrier, both ? kSlotBytes : kUnitBytes);
            bulk_load(to, from, kUnitBytes, barrier, kEvictFirst);
            if (both) {
                bulk_load(to + kUnitBytes, from + tile_stride, kUnitBytes, barrier, kEvictFirst);
            }
        }
        --to_fetch;
        fill = fill + 1 == slots ? 0 : fill + 1;
        from += kUnitBytes;
        if (++fetch_chunk == num_chunks) {
            fetch_chunk = 0;
            ++fetch_pair;
            from += 2 * tile_stride - num_chunks * kUnitBytes;
        }
    };
    if (!p.constant_weight) {
        pdl_wait();
    }
#pragma unroll 1
    for (int i = 0; i < slots && to_fetch > 0; ++i) {
        fetch();
    }

    // --- x of the block's chunks: a token a warp; past the end of K zeros --------------------------------------------
    pdl_wait();
    pdl_launch_dependents();
    if (elect_one()) {
        static_assert(kSplitTokens == kSplitWarps);
        const uint32_t barrier = shared_address(&x_ready);
        if (warp < num_tokens) {
            char* row = shared + warp * args.x_stride;
            const int k = first_chunk * kUnitSize, bytes = min(in_size - k, num_chunks * kUnitSize) * 2;
            for (int i = bytes; i < num_chunks * kUnitSize * 2; i += 16) {
                *reinterpret_cast<uint4*>(row + i) = uint4{};
            }
            mbarrier_arrive_expect_bytes(barrier, bytes);
            bulk_load(shared_address(row), static_cast<const T*>(p.x) + warp * p.x_token_stride + k, bytes, barrier,
                      kEvictNormal);
        } else {
            mbarrier_arrive(barrier);
        }
    }
    // The factors are read now, and kept where they are needed once that has taken its time.
    const auto factor_at = [&](int i) {
        const int64_t row = int64_t{first_tile} * kUnitRows + i;
        return i < my_tiles * kUnitRows && row < p.out_size ? p.row_factors[row] : 0.0f;
    };
    const float my_factor = factor_at(threadIdx.x);
    __syncwarp();
    mbarrier_wait(shared_address(&x_ready), 0);

    // --- Products ----------------------------------------------------------------------------------------------------
    // Tokens past the last are what shared memory held, and are not written.
    const char* x_lane = shared + g * args.x_stride + t * F::kTokenSteps * 16;
    bool others_here = false, said_head = false;
    const auto say_head = [&] {
        if (!said_head) {
            mbarrier_arrive(shared_address(&head_ready[warp]));
            said_head = true;
        }
    };
    int slot = 0, chunk = begin_chunk;
    uint32_t parity = 0;
    for (int pair = first_pair; left > 0; ++pair) {
        const int first = chunk, end = min(num_chunks, first + left);
        float sum[2][kTokenTiles][4] = {};
        for (; chunk < end; ++chunk) {
            mbarrier_wait(shared_address(&full[warp][slot]), parity);
            const char* unit = ring + slot * kSlotBytes;
            const char* x_chunk = x_lane + chunk * kUnitSize * 2;
            float part[2][kTokenTiles][4] = {};
            uint4 piece[2], x[2][kTokenTiles];
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                if (step % F::kTokenSteps == 0) {
#pragma unroll
                    for (int i = 0; i < F::kTokenSteps; ++i) {
#pragma unroll
                        for (int n = 0; n < kTokenTiles; ++n) {
                            x[(step + i) % 2][n] =
                                *reinterpret_cast<const uint4*>(x_chunk + n * 8 * args.x_stride +
                                                                (F::kTokenSteps == 1 ? step * 64 : step * 64 + i * 16));
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const char* mine = unit + r * kUnitBytes;
                    const char* scales = mine + F::kPieces * 512;
                    if (step % 2 == 0) {
                        piece[r] = *reinterpret_cast<const uint4*>(mine + step / 2 * 512 + my_piece);
                    }
                    uint32_t row_pair[2];
                    F::template prepare<T>(row_pair, scales, step, g, t);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        uint32_t a[4];
                        F::template unpack<T>(piece[r], step, j, row_pair, a);
#pragma unroll
                        for (int n = 0; n < kTokenTiles; ++n) {
                            const bool one = F::kTokenSteps == 1;
                            const uint32_t b0 =
                                one ? word_of(x[step % 2][n], j * 2) : word_of(x[0][n], step % 2 * 2 + j);
                            const uint32_t b1 =
                                one ? word_of(x[step % 2][n], j * 2 + 1) : word_of(x[1][n], step % 2 * 2 + j);
                            mma_m16n8k16<T>(kScaled ? part[r][n] : sum[r][n], a, b0, b1);
                        }
                    }
                    if constexpr (kScaled) {
                        if ((step + 1) % F::kScaleSteps == 0) {
                            const float2 scale = F::scale(scales, step / F::kScaleSteps, g);
#pragma unroll
                            for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
                                for (int e = 0; e < 4; ++e) {
                                    sum[r][n][e] = fmaf(part[r][n][e], e < 2 ? scale.x : scale.y, sum[r][n][e]);
                                    part[r][n][e] = 0.0f;
                                }
                            }
                        }
                    }
                }
            }
            __syncwarp();
            if (to_fetch > 0) {
                fetch();
            }
            if (++slot == slots) {
                slot = 0;
                parity ^= 1;
            }
        }
        chunk = 0;
        left -= end - first;

        float* flat = &sum[0][0][0];
        if (first > 0) {  // what another warp has begun
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                heads[((warp - 1) * kSums + i) * 32 + t * 8 + g] = flat[i];
            }
            say_head();
            continue;
        }
        say_head();
        for (int other = warp + 1, done = end; done < num_chunks; ++other) {
            const int share = share_begin(other + 1) - share_begin(other);
            if (share > 0) {
                mbarrier_wait(shared_address(&head_ready[other]), 0);
#pragma unroll
                for (int i = 0; i < kSums; ++i) {
                    flat[i] += heads[((other - 1) * kSums + i) * 32 + t * 8 + g];
                }
                done += share;
            }
        }
        if (!others_here) {
            cluster_wait();
            others_here = true;
        }
#pragma unroll
        for (int to = 0; to < kSplitBlocks; ++to) {
            float* there = in_block(sums + my_sums + pair * kShare * 32, to);
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                there[i * 32] = flat[to * kShare + i];
            }
        }
    }
    for (int i = threadIdx.x; i < my_tiles * kUnitRows; i += kSplitThreads) {
        factors[i] = i < kSplitThreads ? my_factor : factor_at(i);
    }
    if (!others_here) {
        cluster_wait();
    }
    cluster_sync();  // all sums are here, and no block reaches into another one after this

    // --- This block's part of the sums -------------------------------------------------------------------------------
#pragma unroll 4
    for (int i = threadIdx.x; i < pairs * kShare * 32; i += kSplitThreads) {
        float y = 0.0f;
#pragma unroll
        for (int source = 0; source < kSplitBlocks; ++source) {
            y += sums[source * pairs * kShare * 32 + i];
        }
        const int e = i / 32 % kShare + rank * kShare, of = i % 32;  // of sum
        const int token = e / 4 % kTokenTiles * 8 + of / 8 * 2 + e % 2;
        const int row = i / (32 * kShare) * 32 + e / (4 * kTokenTiles) * 16 + e / 2 % 2 * 8 + of % 8;
        const int64_t n = int64_t{first_tile} * kUnitRows + row;
        if (token < num_tokens && row < my_tiles * kUnitRows && n < p.out_size) {
            y *= factors[row] * F::template kLeftOut<T>;
            if (p.bias != nullptr) {
                y += to_float(static_cast<const T*>(p.bias)[n]);
            }
            static_cast<T*>(p.out)[token * p.out_token_stride + n] = from_float<T>(y);
        }
    }
#endif
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// Clusters that the device holds at once, which are fewer than its SMs are for where a processing cluster has an SM too
// few.
template <typename Kernel>
int clusters_at_once(Kernel kernel, int shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kSplitBlocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kSplitBlocks);
    config.blockDim = dim3(kSplitThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
    return clusters;
}

// False, and nothing is launched, where K is too short or a block has no room.
template <typename T, typename F>
bool launch_weight_only_split(const WeightOnlyParams& p, void* stream) {
    using Shape = SplitShape<F>;
    const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    constexpr auto kKernel = weight_only_split_kernel<T, F>;
    // Of the first device that asks: where others of Hopper differ, these are right and not the fastest.
    static const int limit = [] {
        cudaFuncAttributes attributes{};
        check_cuda(cudaFuncGetAttributes(&attributes, kKernel), "cudaFuncGetAttributes");
        return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(attributes.sharedSizeBytes);
    }();
    static const int at_once = clusters_at_once(kKernel, limit);
    const int num_tiles = ceil_div(p.out_size, kUnitRows), chunks = ceil_div(p.in_size, kUnitSize);
    const int clusters = std::min(num_tiles, at_once);
    if (chunks < kSplitBlocks || clusters == 0) {
        return false;
    }
    const int tiles = ceil_div(num_tiles, clusters);
    const int x_stride = ceil_div(chunks, kSplitBlocks) * kUnitSize * 2 + Shape::kPad;
    const int room = limit - Shape::other_bytes(tiles, x_stride);
    // A ring that holds all of a warp's share, or else 2 slots: the more of W is under way before x, the later x comes.
    const int share = ceil_div((tiles + 1) / 2 * ceil_div(chunks, kSplitBlocks), kSplitWarps);
    const int slots =
        std::min(room / (kSplitWarps * Shape::kSlotBytes), share <= kSplitMostSlots ? kSplitMostSlots : 2);
    if (slots < 2) {
        return false;
    }
    launch(kKernel,
           {.grid = dim3(static_cast<unsigned>(clusters * kSplitBlocks)),
            .block = dim3(kSplitThreads),
            .shared_bytes = static_cast<size_t>(limit),
            .pdl = true,
            .cluster = kSplitBlocks},
           stream, SplitArgs{p, num_tiles / clusters, num_tiles % clusters, slots, x_stride});
    return true;
}

}  // namespace
}  // namespace fastkernels
