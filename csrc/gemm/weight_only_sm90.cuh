// out = x W^T + bias with W in 4 or 8 bits and x as it is, or of int4 in e4m3, on Hopper: TMA, and wgmma with W as the
// operand in registers.
//
//   x [num_tokens, K] bf16 | fp16, or e4m3 with x_scales [num_tokens]   W in units of 16 rows x 128 (weight_only.h)
//   bias [N]   out [num_tokens, N]   bf16 | fp16
//
// A tile is 128 rows of W times kN tokens. A block takes one after the other; those that are left over for a last
// round, or all where there are few, are for clusters, whose blocks share a tile's K.
//   Producer, a thread of each of 4 warps: chunks of 128 along K, 8 units of W by bulk copies and kN rows of x by TMA,
//   into a ring. What the ring holds of W is asked for before griddepcontrol.wait, while the kernel before this one
//   ends.
//   Consumers, 2 or 4 warpgroups of 64 rows: unpack 64 neighbours of W, the operands of four wgmmas, while others are
//   multiplied. Weights are the codes themselves, less their zero points, and exact; sums of a chunk or of a group
//   with a scale are multiplied by the scale and added in fp32. For 256 tokens there are no registers for that:
//   codes of x as it is are multiplied by their scales before, rounded; with e4m3 the tokens take turns by 128.
// Out is transposed by way of shared memory, each warp on its own. Where a cluster shares K, each block leaves its sums
// in its ring, and adds up those of its part of the tokens in the order of the blocks.
//
// FLOPs: 2 * K an element of out. Bytes: W once for kN tokens, from L2 but for the first; x once for 128 rows.
// Source: none; the roles are those of matmul_sm90.cuh.
#pragma once

#include "common/launch.h"
#include "common/ptx/elect.cuh"
#include "gemm/weight_only_sm90_consumer.cuh"
#include "gemm/weight_only_sm90_producer.cuh"

namespace fastkernels {
namespace {

// Warpgroup 0 is the producer, the others consume.
template <typename T, typename F, int kN>
__global__ void __launch_bounds__(WeightTileShape<F, kN>::kThreads, 1)
    weight_only_sm90_kernel(const __grid_constant__ WeightOnlyTileArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = WeightTileShape<F, kN>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    WeightTileShared<Shape>& shared = *reinterpret_cast<WeightTileShared<Shape>*>(shared_bytes);
    static_assert(sizeof(WeightTileShared<Shape>) <= Shape::kMostBytes && Shape::kSlots >= 3);
    static_assert(kN * kWeightTileRows * 4 <= Shape::kSlots * Shape::kXBytes, "a cluster's sums are left there");

    if (threadIdx.x == 0) {
        tma_prefetch_map(args.x_map);
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), 8 * 32);  // a team's lanes, each of which has read it
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // known to be the same for all lanes
    if (warpgroup == 0) {
        give_registers<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (elect_one()) {
            produce_weight_tiles<Shape, kN>(args, shared, warp);
        }
        if (shares_tile(args)) {
            cluster_sync();  // the consumers' sums
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        pdl_wait();
        const int lane = threadIdx.x % 32;
        InOrder order = order_of<F>(lane);
        wgmma_hold(order.piece);  // or the compiler works it out anew for every chunk
        WeightTileConsumer<T, F, kN>{
            args,  shared, (warpgroup - 1) / 2, (warpgroup - 1) % 2, static_cast<int>(threadIdx.x / 32 % 4), lane,
            order, {}}
            .run();
    }
    if (shares_tile(args)) {
        cluster_sync();  // no block ends while another one reads from it
    }
#endif
}

template <typename T, typename F, int kN>
void launch_weight_only_sm90(const WeightOnlyTileArgs& args, void* stream) {
    using Shape = WeightTileShape<F, kN>;
    launch(weight_only_sm90_kernel<T, F, kN>,
           {.grid = dim3(static_cast<unsigned>(args.blocks)),
            .block = dim3(Shape::kThreads),
            .shared_bytes = sizeof(WeightTileShared<Shape>),
            .pdl = true,
            .cluster = static_cast<unsigned>(args.cluster)},
           stream, args);
}

template <typename T, typename F>
void run_weight_only_sm90(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (tokens) {
        case 16: return launch_weight_only_sm90<T, F, 16>(args, stream);
        case 32: return launch_weight_only_sm90<T, F, 32>(args, stream);
        case 64: return launch_weight_only_sm90<T, F, 64>(args, stream);
        case 128: return launch_weight_only_sm90<T, F, 128>(args, stream);
        case 256:
            if constexpr (kHasWideTile<F>) {
                return launch_weight_only_sm90<T, WideFormat<F>, 256>(args, stream);
            }
            [[fallthrough]];
        default:
            fail("weight_only_linear: there are no tiles of ", tokens,
                 " tokens, only of 16, 32, 64, 128 and, of most formats of 4 bits, 256");
    }
}

template <typename F>
void run_weight_only_sm90(const WeightOnlyTileArgs& args, int tokens, void* stream) {
    switch (args.p.dtype) {
        case DType::bf16: return run_weight_only_sm90<bf16, F>(args, tokens, stream);
        case DType::f16: return run_weight_only_sm90<fp16, F>(args, tokens, stream);
        default: fail("weight_only_linear: dtype ", name(args.p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace
}  // namespace fastkernels
