// The prefill tiles of attention on Hopper: out = softmax(scale * q k^T + mask) v by TMA and wgmma.
//
//   q, out [num_tokens, num_q_heads, D]   bf16 | fp16
//   k, v   [num_keys, num_kv_heads, D] or the pages of the KV cache, dtype of q; or pages of one byte an element (e4m3,
//          e5m2, int8) with a scale for each KV head
//
// One block stays on each SM and takes tiles from the list of prefill items, in its order, by a counter. A tile is 64
// packed rows (row r is token r / group, head r % group) for each consumer warpgroup, against the keys of one KV head
// in blocks of kKeys, the last block first.
//   Producer, 4 warps: one takes tiles and loads Q, into kQSlots places in turn; three look pages up and load K and V
//   through one ring, in the order in which they are used: K0, K1, V0, K2, V1 ... A lane loads one box by TMA: 64
//   columns of the keys of one page, or of kKeys contiguous ones. Keys past the end of a sequence (other sequences',
//   stale pages) are zeroed in the block of V where they occur, since 0 x NaN is NaN; in K they are masked out.
//   Consumers, 64 rows each: S of the next block is issued before P V of the present one, whose product the softmax
//   runs beside; the warpgroups issue in turn, so that one multiplies while another is at its softmax. P goes from the
//   accumulators of S to the A operand in registers. The output passes through Q's place in shared memory, to be stored
//   in pieces of 16 bytes along the rows, while S of the next tile's first block is made.
// Keys and values of one byte are widened to fp16, exactly, by the warps that load them (attention_sm90_widen.cuh), and
// all products are of fp16: q of bf16 is rounded to it. The scale of K joins that of the scores, the scale of V that of
// the output.
// Softmax is online, in powers of 2. Masks are applied only to the first block and to blocks that cross an edge.
// Split tiles are combined by the item that finishes last, in the order of the splits, as in attention_mma.cuh.
//
// FLOPs: 4 * D a row and key. Bytes from L2: the keys once a tile, 4 * D a key.
// Source: Shah et al. 2024 (FlashAttention-3), Kwon et al. 2023 (paged KV).
#pragma once

#include "attention/attention_sm90_consumer.cuh"
#include "attention/attention_sm90_producer.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"

namespace fastkernels {
namespace {

// Warpgroup 0 is the producer, the others consume.
template <typename T, int D, bool kSoftCap, bool kBytes>
__global__ void __launch_bounds__(Sm90Shape<D>::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ Sm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = Sm90Shape<D, kBytes>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Sm90Shared<Shape>& shared = *reinterpret_cast<Sm90Shared<Shape>*>(shared_bytes);
    static_assert(sizeof(Sm90Shared<Shape>) == Shape::kSharedBytes && Shape::kSharedBytes <= 227 * 1024);

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.q_map);
        tma_prefetch_map(args.k_map);
        tma_prefetch_map(args.v_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), Shape::kWidens ? 32 : 1);
            mbarrier_init(shared_address(&shared.empty[i]), Shape::kConsumers * 4);
        }
        for (int i = 0; i < Shape::kQSlots; ++i) {
            mbarrier_init(shared_address(&shared.tile_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]),
                          Shape::kConsumers * 4 * kLanesArrive<Shape, kSoftCap> + Shape::kLoaders * 32);
        }
        for (int i = 0; i < Shape::kLoaders; ++i) {
            mbarrier_init(shared_address(&shared.landed[i]), 1);
        }
        mbarrier_init(shared_address(&shared.q_landed), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    pdl_wait();
    pdl_launch_dependents();  // the decode items of this call, which do not wait for this kernel (attention.cu)

    const int num_tiles = args.a.p.work_map[1] * args.a.p.num_kv_heads;
    const int participants = min(num_tiles, min(static_cast<int>(gridDim.x), args.a.p.work_map[3]));
    if (static_cast<int>(blockIdx.x) >= participants) {
        return;
    }
    if (threadIdx.x < 128) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known to be the same for all lanes
        if (warp == 0) {
            produce_tiles(args, shared, num_tiles, participants);
        } else {
            produce_keys(args, shared, warp);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        consume<T, kSoftCap>(args, shared);
    }
#endif
}

}  // namespace

template <typename T, int D, bool kBytes>
void attention_sm90_head(const Sm90Args& args, int num_blocks, void* stream) {
    launch(args.a.p.soft_cap > 0.0f ? attention_sm90_kernel<T, D, true, kBytes>
                                    : attention_sm90_kernel<T, D, false, kBytes>,
           {.grid = dim3(num_blocks),
            .block = dim3(Sm90Shape<D>::kThreads),
            .shared_bytes = Sm90Shape<D>::kSharedBytes,
            .pdl = true},
           stream, args);
}

}  // namespace fastkernels
