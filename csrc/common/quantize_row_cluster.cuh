// A long row of floats to bytes with a scale of its own, by a cluster: for so few tokens that a block a row would leave
// most of the GPU empty. quantize_rows.cuh has the rest, and says what a Source is.
//
//   out  [num_tokens, size] e4m3 | int8 | e5m2     scales  [num_tokens]
//
// kRowCluster blocks own a row and a thread one piece of it, kept as floats; the blocks tell each other their maximum
// through distributed shared memory. Bytes: the row once.
#pragma once

#include "common/byte_scales.h"
#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"

namespace fastkernels {

inline constexpr int kRowCluster = 8;
inline constexpr int kRowClusterMaxThreads = 512;
inline constexpr int64_t kRowClusterMinPieces = 1024;  // below, a block has a row as quickly

// blocks_per_sm: more, and rows of a block each are as quick; activations, which have more to compute, gain longer.
inline bool suits_row_cluster(int64_t num_tokens, int64_t pieces, int blocks_per_sm) {
    return num_tokens * kRowCluster <= int64_t{blocks_per_sm} * num_sms() && pieces >= kRowClusterMinPieces &&
           pieces <= int64_t{kRowCluster} * kRowClusterMaxThreads && compute_capability() >= 90;
}

template <typename T, typename Byte, typename Source>
__global__ void __launch_bounds__(kRowClusterMaxThreads)
    quantize_row_cluster_kernel(const Source source, Byte* out, int64_t token_stride, float* scales, int size) {
    constexpr int kVec = kVecElements<T>;
    __shared__ float of_warps[kRowClusterMaxThreads / 32], of_blocks[kRowCluster];
    const unsigned token = blockIdx.x / kRowCluster;
    const int rank = cluster_rank(), at = (rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVec;
    pdl_launch_dependents();
    cluster_sync();  // all have begun: their shared memory may be written
    pdl_wait();
    float x[kVec];
    source.compute(at < size ? source.read(token, at) : typename Source::Raw{}, x);
    float largest = warp_max(largest_of(x));
    if (threadIdx.x % 32 == 0) {
        of_warps[threadIdx.x / 32] = largest;
    }
    __syncthreads();
    if (threadIdx.x < kRowCluster) {
        largest = 0.0f;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
            largest = fmaxf(largest, of_warps[warp]);
        }
        *in_block(&of_blocks[rank], static_cast<int>(threadIdx.x)) = largest;
    }
    cluster_sync();
    largest = 0.0f;
#pragma unroll
    for (int block = 0; block < kRowCluster; ++block) {
        largest = fmaxf(largest, of_blocks[block]);
    }
    const float scale = byte_scale_of<Byte>(largest);
    if (rank == 0 && threadIdx.x == 0) {
        scales[token] = scale;
    }
    if (at < size) {
        store_quantized(out + token * token_stride + at, x, 1.0f / scale);
    }
}

template <typename Byte, typename T, typename Source>
void launch_quantize_row_cluster(const Source& source, Byte* out, int64_t token_stride, float* scales,
                                 int64_t num_tokens, int64_t size, void* stream) {
    const int64_t pieces = size / kVecElements<T>, own = (pieces + kRowCluster - 1) / kRowCluster;
    launch(quantize_row_cluster_kernel<T, Byte, Source>,
           {.grid = dim3(static_cast<unsigned>(num_tokens) * kRowCluster),
            .block = dim3(static_cast<unsigned>((own + 31) / 32 * 32)),
            .pdl = true,
            .cluster = kRowCluster},
           stream, source, out, token_stride, scales, static_cast<int>(size));
}

}  // namespace fastkernels
