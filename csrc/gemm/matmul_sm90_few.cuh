// out = x weight^T + bias + residual on Hopper for up to 64 tokens and few rows of the weight: a cluster shares a tile
// along K.
//
//   Operands and types: matmul_sm90.cuh. A is the weight, B the tokens.
//
// A tile is 64 rows of the weight times kN tokens. Each of a cluster's 2 or 4 blocks has its share of the chunks of K
// and its own ring, at most half an SM's shared memory, so that every SM has work where there are not as many tiles,
// and the next kernels' blocks come in beside. Their sums meet in shared memory: warp w of 4 has 16 rows, and sends
// them to block w / (4 / cluster), which adds up what the blocks sent in their order, so that the same bits come out
// always, and writes out. No workspace, no counter, and no fence: the stores count at the receiver's mbarrier.
//   Producer, one thread: as in matmul_sm90.cuh. Another warp copies scales of blocks.
//   Consumers, one warpgroup.
//
// FLOPs: 2 * K an element of out. Bytes: the weight once, from L2 kN rows of x for each 64 of it.
#pragma once

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/cluster_barrier.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/elect.cuh"
#include "common/ptx/movmatrix.cuh"
#include "common/ptx/store_async.cuh"
#include "gemm/matmul_sm90_out.cuh"
#include "gemm/matmul_sm90_producer.cuh"
#include "gemm/matmul_sm90_product.cuh"

namespace fastkernels {
namespace {

template <typename T, MatmulScales kScales, int kN, int kSlots_>
struct MatmulFewShape {
    static constexpr bool kByBlock = kScales == MatmulScales::block;
    static constexpr int kWarps = 4;  // that consume
    static constexpr int kThreads = 32 * (kWarps + (kByBlock ? 2 : 1));
    static constexpr int kElements = 128 / static_cast<int>(sizeof(T));  // of a chunk
    static constexpr int kABytes = kMatmulFewRows * 128, kSlotBytes = kABytes + kN * 128, kSlots = kSlots_;
    static constexpr int kTokens = kN, kPieces = 1;                  // as in MatmulShape
    static constexpr int kChunkScales = kByBlock ? kTokens + 4 : 0;  // of a chunk's tokens, then of the weight
    static constexpr int kTileScales = kScales == MatmulScales::channel ? kN + kMatmulFewRows : 0;
    static constexpr int kPartBytes = kMatmulFewRows * kN * 4;
    // 16 KB of parts leave room for more of the ring where they lie in it; then all blocks must be done with theirs.
    static constexpr bool kPartsInRing = kN > 32;
    static_assert(!kPartsInRing || kPartBytes <= kSlots * kSlotBytes);
};

template <typename Shape>
struct MatmulFewShared {
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];  // A, then B
    alignas(16) unsigned char parts[Shape::kPartsInRing ? 16 : Shape::kPartBytes];
    alignas(16) float chunk_scales[std::max(1, Shape::kSlots* Shape::kChunkScales)];
    alignas(16) float tile_scales[std::max(1, Shape::kTileScales)];  // of tokens, then of the weight's rows that this
                                                                     // block finishes
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];              // in this order
    uint64_t arrived;                                                // the parts
};

template <typename Shape>
__device__ __forceinline__ void produce_share(const MatmulArgs& args, MatmulFewShared<Shape>& shared, int a_row,
                                              int b_row, int begin, int end) {
    const uint32_t slots = keep(shared_address(shared.ring)), full = keep(shared_address(shared.full));
    const auto load_weight = [&](uint32_t slot, int chunk) {
        mbarrier_arrive_expect_bytes(full + slot * 8, Shape::kSlotBytes);
        load_weight_rows(slots + slot * Shape::kSlotBytes, args, args.a_map, chunk * Shape::kElements, a_row,
                         full + slot * 8, kEvictFirst);
    };
    int early = args.constant_weight ? min(Shape::kSlots, end - begin) : 0;  // as in produce()
    for (int i = 0; i < early; ++i) {
        load_weight(i, begin + i);
    }
    pdl_wait();
    if (!args.launch_late) {
        pdl_launch_dependents();
    }
    RingPlace<Shape::kSlots> ring;
    for (int chunk = begin; chunk < end; ++chunk) {
        if (early > 0) {
            --early;
        } else {
            mbarrier_wait(full + (Shape::kSlots + ring.slot()) * 8, ring.parity() ^ 1);
            load_weight(ring.slot(), chunk);
        }
        tma_load(slots + ring.slot() * Shape::kSlotBytes + Shape::kABytes, args.b_map, chunk * Shape::kElements, b_row,
                 full + ring.slot() * 8, kEvictNormal);
        ring.next();
    }
    pdl_launch_dependents();
}

// Eight tokens of 16 rows of the weight, as mma leaves them: y[0] and y[1] are of row lane / 4 and the tokens lane % 4
// * 2 and the next, y[2] and y[3] of row lane / 4 + 8. Gated these are the gate and up of the same 8 columns of out.
__device__ __forceinline__ void store_eight_tokens(const MatmulArgs& args, float (&y)[4], int token, int row) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int column = args.gated ? row / 2 : row, halves = args.gated ? 1 : 2;
    if (args.gated) {
        y[0] = times_sigmoid<bf16>(y[0], y[0]) * y[2];
        y[1] = times_sigmoid<bf16>(y[1], y[1]) * y[3];
    }
    if (args.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t of = min(token + t * 2 + i % 2, args.num_tokens - 1);
            const int at = min(column + g + i / 2 * 8, args.out_size - 1);
            y[i] += matmul_value(args.residual, of * args.residual_token_stride + at, args.is_fp16);
        }
    }
    const float inverse = args.out_type == MatmulOut::values ? 1.0f : 1.0f / *args.out_scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half == halves) {
            break;
        }
        uint32_t pair[1];
        if (args.out_type == MatmulOut::values) {
            pack_out<2>({y[half * 2], y[half * 2 + 1]}, pair, args.is_fp16);
        } else {
            pair[0] = matmul_byte(y[half * 2] * inverse, args.out_type) |
                      matmul_byte(y[half * 2 + 1] * inverse, args.out_type) << 16;
        }
        const uint32_t columns = movmatrix_trans(pair[0]);  // of token g, columns 2t and the next
        const int at = column + half * 8 + t * 2;
        if (token + g < args.num_tokens && at < args.out_size) {
            const int64_t to = (token + g) * args.out_token_stride + at;
            if (args.out_type != MatmulOut::values) {
                static_cast<uint16_t*>(args.out)[to / 2] = static_cast<uint16_t>(columns | columns >> 8);
            } else if (at + 1 < args.out_size) {
                *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.out) + to) = columns;
            } else {
                static_cast<uint16_t*>(args.out)[to] = static_cast<uint16_t>(columns);
            }
        }
    }
}

template <typename T, MatmulScales kScales, int kN, int kSlots>
__global__ void __launch_bounds__(MatmulFewShape<T, kScales, kN, kSlots>::kThreads, 2)
    matmul_sm90_few_kernel(const __grid_constant__ MatmulArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = MatmulFewShape<T, kScales, kN, kSlots>;
    using Product = MatmulProduct<T, kScales, false, kN, 1, Shape>;
    using Sum = typename Product::Sum;
    constexpr int kWarps = Shape::kWarps, kSums = kN / 2;
    constexpr int kPart = kN / 8 * 32;  // of 16 bytes: what a warp sends
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    MatmulFewShared<Shape>& shared = *reinterpret_cast<MatmulFewShared<Shape>*>(shared_bytes);

    const int cluster = cluster_size(), rank = cluster_rank(), tile = blockIdx.x / cluster;
    const int a_row = tile / args.schedule.b_tiles * kMatmulFewRows, b_row = tile % args.schedule.b_tiles * kN;
    const int begin = rank * args.schedule.chunks / cluster, end = (rank + 1) * args.schedule.chunks / cluster;
    const int eights = min(kN, args.num_tokens - b_row + 7) / 8;  // of tokens
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

    if (warp == kWarps && elect_one()) {
        tma_prefetch_map(args.a_map);
        tma_prefetch_map(args.b_map);
        for (int i = 0; i < kSlots; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), Shape::kByBlock ? 1 + 32 : 1);
            mbarrier_init(shared_address(&shared.empty[i]), kWarps * (Shape::kByBlock ? 32 : 1));
        }
        mbarrier_init(shared_address(&shared.arrived), 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect_bytes(shared_address(&shared.arrived), kWarps * eights * (32 * 16));
    }
    __syncthreads();
    if constexpr (!Shape::kPartsInRing) {
        cluster_arrive_relaxed();  // this block has begun, and may be sent parts
    }
    if (warp >= kWarps) {
        if (warp == kWarps) {
            if (elect_one()) {
                produce_share<Shape>(args, shared, a_row, b_row, begin, end);
            }
        } else {
            if constexpr (Shape::kByBlock) {
                pdl_wait();
                RingPlace<kSlots> ring;
                copy_scales<Shape, false>(args, keep(shared_address(shared.chunk_scales)),
                                          keep(shared_address(shared.full)), ring, a_row, b_row, begin, end);
            }
        }
        __syncwarp();
        if constexpr (Shape::kPartsInRing) {
            cluster_arrive_relaxed();
        }
        cluster_wait();
        return;
    }

    pdl_wait();
    const int lane = static_cast<int>(keep(threadIdx.x % 32));
    const int parts_here = kWarps / cluster;  // warps' rows that this block writes out
    const int first_row = a_row + rank * parts_here * 16;
    if constexpr (kScales == MatmulScales::channel) {
        for (int i = threadIdx.x; i < kN + parts_here * 16; i += kWarps * 32) {
            const int at = i < kN ? b_row + i : first_row + i - kN;
            cp_async_4(shared_address(shared.tile_scales + i),
                       i < kN ? args.token_scales + min(at, args.num_tokens - 1)
                              : args.weight_scales + matmul_weight_row(args, at) * args.weight_scale_stride);
        }
        cp_async_commit();
    }
    Sum sum[kSums];
    if (begin < end) {
        Product{0,
                0,
                warp,
                lane,
                keep(shared_address(shared.full)),
                keep(shared_address(shared.chunk_scales)),
                keep(descriptor_low(shared_address(shared.ring))),
                uniform(Shape::kABytes >> 4),
                {}}
            .multiply_segment(sum, end - begin, args.gated);
    } else {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            sum[i] = 0;
        }
    }

    // To the block that writes this warp's rows, as the lanes hold them, eight tokens after eight.
    const uint32_t parts = shared_address(Shape::kPartsInRing ? shared.ring[0] : shared.parts);
    if constexpr (Shape::kPartsInRing) {
        cluster_arrive_relaxed();
    }
    cluster_wait();
    {
        const int writer = warp / parts_here, place = rank * parts_here + warp % parts_here;
        const uint32_t to = address_in_block(parts + (place * kPart + lane) * 16, writer);
        const uint32_t arrived = address_in_block(shared_address(&shared.arrived), writer);
#pragma unroll
        for (int i = 0; i < kN / 8; ++i) {
            if (i < eights) {
                const Sum* d = sum + i * 4;
                store_async(to + i * (32 * 16),
                            make_uint4(sum_bits(d[0]), sum_bits(d[1]), sum_bits(d[2]), sum_bits(d[3])), arrived);
            }
        }
    }

    // Of each 16 rows that are written here `cluster` warps take every cluster-th eight tokens.
    const int part = warp / cluster, row = first_row + part * 16, g = lane / 4, t = lane % 4;
    float more[2], weight_scale[2] = {1, 1};
    Sum row_sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        more[half] = matmul_bias(args, row + g + half * 8);
        row_sum[half] = matmul_weight_sum<T>(args, row + g + half * 8);
    }
    if constexpr (kScales == MatmulScales::channel) {
        cp_async_wait<0>();
        named_barrier_sync(1, kWarps * 32);
        weight_scale[0] = shared.tile_scales[kN + part * 16 + g];
        weight_scale[1] = shared.tile_scales[kN + part * 16 + g + 8];
    }
    mbarrier_wait(shared_address(&shared.arrived), 0);
    for (int i = warp % cluster; i < eights; i += cluster) {
        const uint32_t from = parts + (part * kPart + i * 32 + lane) * 16;
        Sum d[4];
#pragma unroll 2
        for (int of = 0; of < cluster; ++of) {
            const float4 y = load_shared_4(from + of * parts_here * (kPart * 16));
            const Sum of_block[4] = {sum_of_bits<Sum>(__float_as_uint(y.x)), sum_of_bits<Sum>(__float_as_uint(y.y)),
                                     sum_of_bits<Sum>(__float_as_uint(y.z)), sum_of_bits<Sum>(__float_as_uint(y.w))};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                d[j] = of == 0 ? of_block[j] : d[j] + of_block[j];
            }
        }
        const int column = i * 8 + t * 2;  // d: tokens column and the next of row g, then of g + 8
        float2 scale = make_float2(1, 1);
        if constexpr (kScales == MatmulScales::channel) {
            scale = *reinterpret_cast<const float2*>(shared.tile_scales + column);
        }
        const Sum zero[2] = {matmul_token_zero<T>(args, b_row + column),
                             matmul_token_zero<T>(args, b_row + column + 1)};
        float out[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Sum whole = d[j] - zero[j % 2] * row_sum[j / 2];
            out[j] = finish_sum<kScales>(whole, (j % 2 == 0 ? scale.x : scale.y) * weight_scale[j / 2], more[j / 2]);
        }
        store_eight_tokens(args, out, b_row + i * 8, row);
    }
#endif
}

template <typename T, MatmulScales kScales, int kTile>
void launch_few(const MatmulArgs& args, void* stream) {
    constexpr MatmulFewTile kT = kMatmulFewTiles[kTile];
    using Shape = MatmulFewShape<T, kScales, kT.columns, kT.slots>;
    const int tiles = args.schedule.a_tiles * args.schedule.b_tiles;
    launch(matmul_sm90_few_kernel<T, kScales, kT.columns, kT.slots>,
           {.grid = dim3(static_cast<unsigned>(tiles * kT.cluster)),
            .block = dim3(Shape::kThreads),
            .shared_bytes = sizeof(MatmulFewShared<Shape>),
            .pdl = true,
            .cluster = static_cast<unsigned>(kT.cluster)},
           stream, args);
}

}  // namespace

template <typename T, MatmulScales kScales>
void matmul_sm90_few(const MatmulArgs& args, int tile, void* stream) {
    switch (tile) {
        case 0: return launch_few<T, kScales, 0>(args, stream);
        case 1: return launch_few<T, kScales, 1>(args, stream);
        case 2: return launch_few<T, kScales, 2>(args, stream);
        case 3: return launch_few<T, kScales, 3>(args, stream);
        default: fail("matmul: there is no tile ", tile, " of few tokens, only 0 to ", kNumMatmulFewTiles - 1);
    }
}

}  // namespace fastkernels
