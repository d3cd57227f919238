// out = x weight^T + bias + residual of bytes with scales, for any number of tokens, on GPUs from sm_80 on: cp.async
// and mma.sync.
//
//   x [num_tokens, K]   weight [N, K]   bias [N]   out [num_tokens, N]
//   T, of x: int8 | e4m3 | e5m2; weight: int8 | e4m3; K whole 16 bytes
//   out, bias and residual, which is as out: bf16 | fp16; out with a scale, by which it is divided: e4m3 | int8
//   gated: weight [2 N, K], a gate's rows, then up's, and out = silu(x gate^T) * (x up^T)
//
// A block owns kSize tokens x kSize rows of the weight and all of K, in chunks of 128 bytes that pass through a ring in
// shared memory; what lies past the edges is zeros. A warp owns kSize / 2 tokens x 32 rows. Its 32 columns are not
// those that lie side by side: column c of the mma's tile j is row 8 (c / 2) + 2 j + c % 2, so that of a token a lane
// holds 8 neighbours of out, one store. 16-byte pieces are swizzled so that the 8 rows of an ldmatrix lie in different
// banks.
//
// GPUs before sm_89 multiply no fp8, and Hopper not by mma.sync: bytes become fp16 in registers, which is exact, and
// sums are fp32. Others do, with about 14 bits: there the product of each chunk is added to fp32 registers, as it is
// where blocks have scales. Sums of int8 are int32; with zero points, sums of the weight's rows are taken off.
//
// Gated, a block's rows are 4 of the gate and 4 of up in turn, and so are a lane's 8.
//
// Blocks go through 8 tiles of tokens before the next rows of the weight, so that what runs at a time is about a
// square. FLOPs: 2 * K an element of out. Bytes: from L2, 2 K / kSize an element of out. Source: NVIDIA's CUTLASS (the
// ring of cp.async).
#pragma once

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mma_bytes.cuh"
#include "common/ptx/pdl.cuh"
#include "common/sigmoid.cuh"
#include "gemm/matmul_sm80.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

template <int kSize>
struct Sm80Shape {
    static constexpr int kThreads = kSize == 128 ? 256 : 128, kBlocksPerSm = kSize == 128 ? 1 : 3;
    static constexpr int kWarpTokens = kSize / 2, kWarpRows = 32, kTokenTiles = kWarpTokens / 16, kRowTiles = 4;
    static constexpr int kWarpsAlongRows = kSize / kWarpRows;
    static constexpr int kSlots = 3, kOperandBytes = kSize * 128, kSlotBytes = 2 * kOperandBytes;
    static constexpr int kSharedBytes = kSlots * kSlotBytes;
    static_assert(kThreads / 32 == 2 * kWarpsAlongRows);
};

// Where piece c of a row lies in it is c ^ this; see ldmatrix below.
__device__ __forceinline__ int weight_swizzle(int row) {
    return (row >> 3 & 3) * 2 + (row & 1);
}

template <typename T, MatmulScales kScales, int kSize>
struct Sm80Block {
    using Shape = Sm80Shape<kSize>;
    using Sum = MatmulSum<T>;
    using Sums = Sum[Shape::kTokenTiles][Shape::kRowTiles][4];
#if __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1000
    static constexpr bool kNativeFp8 = kIsFp8<T>;
#else
    static constexpr bool kNativeFp8 = false;
#endif
    static constexpr bool kByChunk = kNativeFp8 || kScales == MatmulScales::block;

    const MatmulParams& p;
    uint32_t ring;       // in shared memory
    int64_t token, row;  // the block's first
    int warp_token, warp_row, lane;

    // Where a row of the tiles lies in the weight.
    __device__ __forceinline__ int64_t weight_row(int64_t at) const {
        return p.gated ? at / 8 * 4 + at % 4 + (at & 4 ? p.out_size : 0) : at;
    }

    // Both operands' bytes of a chunk. A thread has one piece of every kThreads / 8 rows.
    __device__ __forceinline__ void load(int slot, int chunk) const {
        constexpr int kStep = Shape::kThreads / 8;
        const int piece = threadIdx.x % 8;
        const int64_t at = static_cast<int64_t>(chunk) * 128 + piece * 16;
        const uint32_t x_slot = ring + slot * Shape::kSlotBytes, weight_slot = x_slot + Shape::kOperandBytes;
#pragma unroll
        for (int of = 0; of < kSize; of += kStep) {
            const int i = of + threadIdx.x / 8;
            const bool valid = at < p.in_size && token + i < p.num_tokens;
            const char* from = static_cast<const char*>(p.x) + (valid ? (token + i) * p.x_token_stride + at : 0);
            cp_async_16(x_slot + i * 128 + (piece ^ i % 8) * 16, from, valid);
        }
#pragma unroll
        for (int of = 0; of < kSize; of += kStep) {
            const int i = of + threadIdx.x / 8;
            const bool valid = at < p.in_size && row + i < weight_rows(p);
            const char* from =
                static_cast<const char*>(p.weight) + (valid ? weight_row(row + i) * p.weight_row_stride + at : 0);
            cp_async_16(weight_slot + i * 128 + (piece ^ weight_swizzle(i)) * 16, from, valid);
        }
    }

    // sum += the product of the chunk in a slot
    __device__ __forceinline__ void multiply(Sums& sum, int slot) const {
        const uint32_t x_slot = ring + slot * Shape::kSlotBytes + (warp_token + lane % 16) * 128;
        const int in_tile = lane % 8;
        const uint32_t weight_slot = ring + slot * Shape::kSlotBytes + Shape::kOperandBytes +
                                     (warp_row + in_tile / 2 * 8 + lane / 16 * 2 + in_tile % 2) * 128;
#pragma unroll
        for (int step = 0; step < 4; ++step) {         // 32 bytes along K
            uint32_t weight[Shape::kRowTiles / 2][4];  // of two tiles: b0 and b1 of the first, then of the second
#pragma unroll
            for (int pair = 0; pair < Shape::kRowTiles / 2; ++pair) {
                ldmatrix_x4(weight[pair], weight_slot + pair * (4 * 128) + ((step * 2 + lane / 8 % 2) ^ in_tile) * 16);
            }
#pragma unroll
            for (int m = 0; m < Shape::kTokenTiles; ++m) {
                uint32_t x[4];
                ldmatrix_x4(x, x_slot + m * (16 * 128) + ((step * 2 + lane / 16) ^ in_tile) * 16);
                multiply_step(sum[m], x, weight);
            }
        }
    }

    static __device__ __forceinline__ void multiply_step(Sum (&sum)[Shape::kRowTiles][4], const uint32_t (&x)[4],
                                                         const uint32_t (&weight)[Shape::kRowTiles / 2][4]) {
        uint32_t halves[2][4];
        if constexpr (kIsFp8<T> && !kNativeFp8) {
            to_halves<T>(x, halves);
        }
#pragma unroll
        for (int n = 0; n < Shape::kRowTiles; ++n) {
            const uint32_t b0 = weight[n / 2][n % 2 * 2], b1 = weight[n / 2][n % 2 * 2 + 1];
            if constexpr (!kIsFp8<T>) {
                mma_m16n8k32_int8(sum[n], x, b0, b1);
            } else if constexpr (kNativeFp8) {
                mma_m16n8k32_fp8<T, MatmulWeight<T>>(sum[n], x, b0, b1);
            } else {
                mma_halves<MatmulWeight<T>>(sum[n], halves, b0, b1);
            }
        }
    }

    // The token of a lane's sums, where half is that of the 16 rows of tile m.
    __device__ __forceinline__ int64_t token_of(int m, int half) const {
        return token + warp_token + m * 16 + half * 8 + lane / 4;
    }

    // sum += the product of a chunk by itself, times its scales where blocks have some
    __device__ __forceinline__ void multiply_chunk(Sums& sum, int slot, int chunk) const {
        if constexpr (!kByChunk) {
            multiply(sum, slot);
        } else {
            float factor[Shape::kTokenTiles][2],
                of_weight[2] = {1.0f, 1.0f};  // of a lane's first four rows, and the rest
            const int64_t chunks = p.in_size / 128;
            if constexpr (kScales == MatmulScales::block) {
                of_weight[0] = p.weight_scales[weight_row(row) / 128 * chunks + chunk];
                of_weight[1] = p.gated ? p.weight_scales[weight_row(row + 4) / 128 * chunks + chunk] : of_weight[0];
            }
#pragma unroll
            for (int i = 0; i < Shape::kTokenTiles * 2; ++i) {
                factor[i / 2][i % 2] = 1.0f;
                if constexpr (kScales == MatmulScales::block) {
                    const int64_t of = min(token_of(i / 2, i % 2), p.num_tokens - 1);
                    factor[i / 2][i % 2] = p.x_scales[of * chunks + chunk];
                }
            }
            Sums part = {};
            multiply(part, slot);
#pragma unroll
            for (int i = 0; i < Shape::kTokenTiles * Shape::kRowTiles * 4; ++i) {
                const int m = i / (Shape::kRowTiles * 4), n = i / 4 % Shape::kRowTiles, e = i % 4;
                sum[m][n][e] = fmaf(part[m][n][e], factor[m][e / 2] * of_weight[n / 2], sum[m][n][e]);
            }
        }
    }

    // Value: of bias and residual, and of out but for bytes
    template <typename Value>
    __device__ __forceinline__ void store(const Sums& sum) const {
        const int64_t first = row + warp_row + lane % 4 * 8;  // of this lane's 8 rows of the weight
        float factor[8], bias[8];
        int32_t row_sum[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t at = weight_row(min(first + i, weight_rows(p) - 1));
            factor[i] = kScales == MatmulScales::channel ? p.weight_scales[p.num_weight_scales == 1 ? 0 : at] : 1.0f;
            bias[i] = p.bias == nullptr ? 0.0f : to_float(static_cast<const Value*>(p.bias)[at]);
            row_sum[i] = std::is_same_v<T, int8_t> && p.weight_sums != nullptr ? p.weight_sums[at] : 0;
        }
#pragma unroll
        for (int i = 0; i < Shape::kTokenTiles * 2; ++i) {
            const int m = i / 2, half = i % 2;
            const int64_t of = token_of(m, half);
            if (of >= p.num_tokens) {
                continue;
            }
            const float scale = kScales == MatmulScales::channel ? p.x_scales[of] : 1.0f;
            const int32_t zero = std::is_same_v<T, int8_t> && p.x_zeros != nullptr ? p.x_zeros[of] : 0;
            float y[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                Sum whole = sum[m][e / 2][half * 2 + e % 2];
                if constexpr (std::is_same_v<T, int8_t>) {
                    whole -= zero * row_sum[e];
                }
                y[e] = fmaf(static_cast<float>(whole), scale * factor[e], bias[e]);
            }
            if (p.gated) {
                float gated[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    gated[e] = times_sigmoid<Value>(y[e], y[e]) * y[e + 4];
                }
                store_neighbours<Value>(gated, of, first / 2);
            } else {
                store_neighbours<Value>(y, of, first);
            }
        }
    }

    template <typename Value, int kCount>
    __device__ __forceinline__ void store_neighbours(float (&y)[kCount], int64_t token, int64_t at) const {
        const bool whole = at + kCount <= p.out_size;
        if (p.residual != nullptr && whole) {
            float before[kCount];
            to_floats(load_vec<kCount>(static_cast<const Value*>(p.residual) + token * p.residual_token_stride + at),
                      before);
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                y[e] += before[e];
            }
        }
        const int64_t to = token * p.out_token_stride + at;
        if (p.out_scale != nullptr) {  // out_size is whole here, as it is with a gate or a residual
            const float inverse = 1.0f / *p.out_scale;
            if (!whole) {
                return;
            }
            p.out_dtype == DType::e4m3 ? store_quantized(static_cast<__nv_fp8_e4m3*>(p.out) + to, y, inverse)
                                       : store_quantized(static_cast<int8_t*>(p.out) + to, y, inverse);
        } else if (whole) {
            store_vec(static_cast<Value*>(p.out) + to, from_floats<Value>(y));
        } else {
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                if (at + e < p.out_size) {
                    static_cast<Value*>(p.out)[to + e] = from_float<Value>(y[e]);
                }
            }
        }
    }
};

template <typename T, MatmulScales kScales, int kSize>
__global__ void __launch_bounds__(Sm80Shape<kSize>::kThreads, Sm80Shape<kSize>::kBlocksPerSm)
    matmul_sm80_kernel(const MatmulParams p, unsigned token_tiles, unsigned row_tiles) {
    using Block = Sm80Block<T, kScales, kSize>;
    using Shape = Sm80Shape<kSize>;
    constexpr unsigned kGroup = 8;  // tiles of tokens
    extern __shared__ __align__(128) unsigned char ring[];
    const unsigned group = blockIdx.x / (kGroup * row_tiles), in_group = blockIdx.x % (kGroup * row_tiles);
    const unsigned tiles = min(kGroup, token_tiles - group * kGroup);
    const int warp = threadIdx.x / 32;
    const Block block{p,
                      shared_address(ring),
                      static_cast<int64_t>(group * kGroup + in_group % tiles) * kSize,
                      static_cast<int64_t>(in_group / tiles) * kSize,
                      warp / Shape::kWarpsAlongRows * Shape::kWarpTokens,
                      warp % Shape::kWarpsAlongRows * Shape::kWarpRows,
                      static_cast<int>(threadIdx.x % 32)};
    const int chunks = static_cast<int>((p.in_size + 127) / 128);
    pdl_wait();
    pdl_launch_dependents();
#pragma unroll
    for (int chunk = 0; chunk < Shape::kSlots - 1; ++chunk) {
        if (chunk < chunks) {
            block.load(chunk, chunk);
        }
        cp_async_commit();
    }
    typename Block::Sums sum = {};
    int slot = 0, next = Shape::kSlots - 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<Shape::kSlots - 2>();
        __syncthreads();  // the chunk is there for all, and nobody reads the slot that is filled next
        if (chunk + Shape::kSlots - 1 < chunks) {
            block.load(next, chunk + Shape::kSlots - 1);
        }
        cp_async_commit();
        block.multiply_chunk(sum, slot, chunk);
        slot = slot + 1 == Shape::kSlots ? 0 : slot + 1;
        next = next + 1 == Shape::kSlots ? 0 : next + 1;
    }
    if (p.bias_dtype == DType::f16) {
        block.template store<fp16>(sum);
    } else {
        block.template store<bf16>(sum);
    }
}

template <typename T, MatmulScales kScales, int kSize>
void launch_sm80(const MatmulParams& p, void* stream) {
    using Shape = Sm80Shape<kSize>;
    const int64_t token_tiles = (p.num_tokens + kSize - 1) / kSize, row_tiles = (weight_rows(p) + kSize - 1) / kSize;
    check(token_tiles * row_tiles < int64_t{1} << 31, "matmul: ", p.num_tokens, " tokens x ", p.out_size,
          " are more tiles than a GPU counts");
    launch(matmul_sm80_kernel<T, kScales, kSize>,
           {.grid = dim3(static_cast<unsigned>(token_tiles * row_tiles)),
            .block = dim3(Shape::kThreads),
            .shared_bytes = Shape::kSharedBytes,
            .pdl = true},
           stream, p, static_cast<unsigned>(token_tiles), static_cast<unsigned>(row_tiles));
}

}  // namespace

template <typename T, MatmulScales kScales>
void matmul_sm80_tile(const MatmulParams& p, int size, void* stream) {
    switch (size) {
        case 128: return launch_sm80<T, kScales, 128>(p, stream);
        case 64: return launch_sm80<T, kScales, 64>(p, stream);
        default: fail("matmul: there are no tiles of ", size, ", only of 128 and 64");
    }
}

}  // namespace fastkernels
