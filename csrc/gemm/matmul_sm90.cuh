// out = x weight^T + bias + residual on Hopper: TMA, wgmma, one block an SM that goes from tile to tile.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]
//   T, of x and weight: bf16 | fp16 | e4m3 | int8, or of x e5m2 where the weight is e4m3; out, bias and residual, which
//   is as out: bf16 | fp16; out with a scale, by which it is divided: e4m3 | int8
//   gated: weight [2 N, K], a gate's rows, then up's, and out = silu(x gate^T) * (x up^T). TMA reads eights of both in
//   turn, so that a lane has the sums of both for the same columns of out.
//
// A tile is 128 rows of A for each block of the cluster, times kN rows of B. For many tokens A is x and B the weight;
// for few of them A is the weight and B the tokens, so that no row of the tensor core's 64 goes to waste. K is cut into
// chunks of 128 bytes. Which block has which chunks of which tile: matmul_sm90_schedule.h.
//   Producer, one thread: loads 128 rows of A and kN of B, a chunk at a time, into a ring. In a cluster a block loads
//   its part of B and sends it to all. What the weight has in the first round of the ring is asked for before
//   griddepcontrol.wait, while the kernel before this one ends.
//   Scales of blocks: another warp copies those of a chunk to its place in the ring.
//   Consumers, 2 warpgroups, 64 rows of A each: the product of a chunk is issued before that of the one
//   before is waited for. Out passes through shared memory, and from there by TMA, which keeps to the matrix's edges.
// Sums are fp32, and int32 of int8, which zero points of x, times the sums of the weight's rows, are taken off. wgmma
// adds up fp8 with about 14 bits: sums of kPromote chunks, of one where blocks have scales, are added to fp32 registers
// where there is room for both, that is, but for tiles of 256 columns.
// At full rate wgmma leaves an SM's schedulers a sixth of their slots. Instructions past that, of whatever kind, cost
// it a cycle each, so the loop over the chunks has few.
// A tile that is cut along K: every warpgroup leaves its part in the workspace, and who comes last adds the parts up in
// their order, so nobody waits, and the same bits come out whoever it is.
//
// FLOPs: 2 * K an element of out. Bytes: from L2, kN rows of B a cluster and tile, 128 rows of A a block and tile.
// Source: NVIDIA's CUTLASS (tiles, clusters), Zhao et al. 2025 (DeepGEMM: scales of blocks).
#pragma once

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/elect.cuh"
#include "gemm/matmul_sm90_consumer.cuh"
#include "gemm/matmul_sm90_producer.cuh"

namespace fastkernels {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FK_CLUSTER(blocks)  // the kernel is empty there
#else
#define FK_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#endif

// Warpgroup 0 is the producer, the others consume.
template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
__global__ void FK_CLUSTER(kCluster) __launch_bounds__(MatmulShape<T, kScales, kTokensAreA, kN, kCluster>::kThreads, 1)
    matmul_sm90_kernel(const __grid_constant__ MatmulArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = MatmulShape<T, kScales, kTokensAreA, kN, kCluster>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    MatmulShared<Shape>& shared = *reinterpret_cast<MatmulShared<Shape>*>(shared_bytes);
    static_assert(sizeof(MatmulShared<Shape>) <= Shape::kMostBytes && Shape::kSlots >= 3);
    const int rank = kCluster == 1 ? 0 : cluster_rank(), worker = blockIdx.x / kCluster;

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.a_map);
        tma_prefetch_map(args.b_map);
        tma_prefetch_map(args.out_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), Shape::kByBlock ? 1 + 32 : 1);
            mbarrier_init(shared_address(&shared.empty[i]),
                          Shape::kConsumers * 4 * (Shape::kByBlock ? 32 + kCluster - 1 : kCluster));
        }
        mbarrier_init_fence();
    }
    if constexpr (kCluster == 1) {
        __syncthreads();
    } else {
        cluster_sync();  // the others write here
    }
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // known to be the same for all lanes
    if (warpgroup == 0) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (warp == 0) {
            if (elect_one()) {
                produce<Shape, kTokensAreA, kN, kCluster>(args, shared, worker, rank);
            }
        } else if (Shape::kByBlock && warp == 1) {
            produce_scales<Shape, kTokensAreA, kN, kCluster>(args, shared, worker, rank);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        pdl_wait();
        const int group = warpgroup - 1;
        Consumer<T, kScales, kTokensAreA, kN, kCluster>{
            {rank,
             group,
             static_cast<int>(threadIdx.x / 32 % 4),
             static_cast<int>(keep(threadIdx.x % 32)),
             keep(shared_address(shared.full)),
             keep(shared_address(shared.chunk_scales)),
             keep(descriptor_low(shared_address(shared.ring) + group * (64 * 128))),
             uniform((Shape::kABytes - group * (64 * 128)) >> 4),
             {}},
            args,
            shared,
            worker}
            .run();
    }
    if constexpr (kCluster > 1) {
        cluster_sync();  // no block ends while another one writes to it
    }
#endif
}

#undef FK_CLUSTER

template <typename T, MatmulScales kScales, int kTile>
void launch_tile(const MatmulArgs& args, int blocks, void* stream) {
    constexpr MatmulTile kT = kMatmulTiles[kTile];
    if constexpr (has_matmul_tile(kT, kMatmulDType<T>, kScales)) {
        using Shape = MatmulShape<T, kScales, kT.tokens_are_a, kT.columns, kT.cluster>;
        launch(matmul_sm90_kernel<T, kScales, kT.tokens_are_a, kT.columns, kT.cluster>,
               {.grid = dim3(blocks),
                .block = dim3(Shape::kThreads),
                .shared_bytes = sizeof(MatmulShared<Shape>),
                .pdl = true},
               stream, args);
    } else {
        fail("matmul: there is no tile ", kTile, ", tactics ", 2 * kTile, " and ", 2 * kTile + 1, ", for these types");
    }
}

}  // namespace

template <typename T, MatmulScales kScales>
void matmul_sm90_tile(const MatmulArgs& args, int tile, int blocks, void* stream) {
    switch (tile) {
        case 0: return launch_tile<T, kScales, 0>(args, blocks, stream);
        case 1: return launch_tile<T, kScales, 1>(args, blocks, stream);
        case 2: return launch_tile<T, kScales, 2>(args, blocks, stream);
        case 3: return launch_tile<T, kScales, 3>(args, blocks, stream);
        case 4: return launch_tile<T, kScales, 4>(args, blocks, stream);
        case 5: return launch_tile<T, kScales, 5>(args, blocks, stream);
        case 6: return launch_tile<T, kScales, 6>(args, blocks, stream);
        case 7: return launch_tile<T, kScales, 7>(args, blocks, stream);
        default: fail("matmul: there is no tile ", tile, ", only 0 to ", kNumMatmulTiles - 1);
    }
}

}  // namespace fastkernels
