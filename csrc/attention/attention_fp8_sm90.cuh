// The prefill tiles of attention over e4m3 on Hopper: out = v_scale * softmax(scale * q_scale * k_scale * q k^T + mask)
// v
//
//   q [num_tokens, num_q_heads, 128]   k, v [num_keys, num_kv_heads, 128] or the pages of the KV cache   e4m3
//   out [num_tokens, num_q_heads, 128] bf16 | fp16   scales [num_kv_heads] fp32
//
// Tiles, masks and splits are those of attention_sm90.cuh: a block stays on each SM, a tile is 128 packed rows against
// the keys of a KV head, the last block of keys first. What differs:
//   V must come with the keys along its rows, so two warps of the producer turn every block over: ldmatrix transposes
//   pairs of bytes, byte permutes part the pairs, stmatrix writes them down. The order in which 16 keys then lie in a
//   row, 0 1 8 9 2 3 10 11 ..., is the one in which a lane's scores become the A operand of P V without leaving the
//   lane; the order of the rows, of 16 dimensions the even ones before the odd, meets no bank conflicts and gives a
//   lane four neighbouring elements of the output. Sums of products of fp8 keep some 13 bits (wgmma_e4m3.cuh). P V of a
//   block therefore goes to registers of its own, which are then added to O in fp32. They are the registers of S, part
//   by part: while one is added up the next is still being multiplied, and S of the next block has begun. Weights are
//   2^8 at most, so that those down to 2^-14 of a row's largest are normal numbers of e4m3. O is rescaled with every
//   block: the multiplication is part of the addition.
//
//   consumer A   P V lo | P V hi | S 2 | S 0 | S 1 |          softmax           | P V lo | ...
//                                   O lo  O hi
//   consumer B              softmax                | P V lo | P V hi | S 2 | S 0 | S 1 | ...
//
// FLOPs: 512 a row and key. Bytes from L2: the keys once a tile, 256 a key.
// Source: Shah et al. 2024 (FlashAttention-3), DeepSeek-AI 2024 (sums of fp8 in two levels).
#pragma once

#include "attention/attention_fp8_sm90_consumer.cuh"
#include "attention/attention_fp8_sm90_producer.cuh"
#include "attention/attention_sm90_producer.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"

namespace fastkernels {
namespace {

// Warpgroup 0 is the producer, the others consume.
template <typename T, bool kSoftCap>
__global__ void __launch_bounds__(Fp8Shape::kThreads, 1)
    attention_fp8_sm90_kernel(const __grid_constant__ Sm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = Fp8Shape;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Fp8Shared& shared = *reinterpret_cast<Fp8Shared*>(shared_bytes);
    static_assert(sizeof(Fp8Shared) <= 227 * 1024);

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.q_map);
        tma_prefetch_map(args.k_map);
        tma_prefetch_map(args.v_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[0][i]), 1);
            mbarrier_init(shared_address(&shared.full[1][i]), 1);
            mbarrier_init(shared_address(&shared.empty[0][i]), Shape::kConsumers * 4);
            mbarrier_init(shared_address(&shared.empty[1][i]), Shape::kTurners);
        }
        for (int i = 0; i < Shape::kTurnedSlots; ++i) {
            mbarrier_init(shared_address(&shared.turned_full[i]), Shape::kTurners);
            mbarrier_init(shared_address(&shared.turned_empty[i]), Shape::kConsumers * 4);
        }
        for (int i = 0; i < Shape::kQSlots; ++i) {
            mbarrier_init(shared_address(&shared.tile_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]), Shape::kConsumers * 4 + 1 + Shape::kTurners);
        }
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
        } else if (warp == 1) {
            produce_fp8_keys(args, shared);
        } else {
            turn_values(args, shared, warp - 2);
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        consume_fp8<T, kSoftCap>(args, shared);
    }
#endif
}

}  // namespace
}  // namespace fastkernels
