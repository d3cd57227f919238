// Reductions over a warp and over a block. The order of additions is fixed, so results repeat bit for bit.
#pragma once

#include <cstdint>

namespace fastkernels {

template <typename Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    return warp_reduce(x, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ float warp_max(float x) {
    return warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });
}

__device__ __forceinline__ uint64_t warp_sum_u64(uint64_t x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

// Sum over the lanes up to and with this one.
__device__ __forceinline__ uint64_t warp_inclusive_scan(uint64_t x, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t before = __shfl_up_sync(0xffffffffu, x, offset);
        x += lane >= offset ? before : 0;
    }
    return x;
}

// Every thread of the block calls it and gets the sum. scratch: at least one float a warp, in shared memory.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    if (num_warps == 1) {
        return x;
    }
    __syncthreads();  // scratch may still be read from an earlier call
    if (lane == 0) {
        scratch[warp] = x;
    }
    __syncthreads();
    return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}

}  // namespace fastkernels
