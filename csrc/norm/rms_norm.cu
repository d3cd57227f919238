// y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; the sum in fp32.
//
//   x, out  [num_tokens, num_heads, size]   weight  [size]   bf16 | fp16 | fp32
//
// A block owns one row; a thread owns 16-byte pieces of it, kept in registers between the two passes for rows of up
// to kMaxPieces pieces a thread, read twice (from L2) beyond. Bytes: 2 * size * sizeof(T) a row; the weight stays in L2.
// Source: Zhang and Sennrich 2019.
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "fastkernels/norm.h"

namespace fastkernels {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxPieces = 4;

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const RmsNormParams p) {
    __shared__ float scratch[kMaxThreads / 32];
    const int64_t token = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const T* weight = static_cast<const T*>(p.weight);
    const int64_t num_pieces = p.size / kVec;
    pdl_wait();

    Vec<T, kVec> kept[kMaxPieces];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxPieces; ++j) {
        const int64_t piece = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
        if (piece < num_pieces) {
            kept[j] = load_vec<kVec>(x + piece * kVec);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum += to_float(kept[j][i]) * to_float(kept[j][i]);
            }
        }
    }
    for (int64_t piece = threadIdx.x + static_cast<int64_t>(kMaxPieces) * blockDim.x; piece < num_pieces;
         piece += blockDim.x) {
        const auto v = load_vec<kVec>(x + piece * kVec);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            sum += to_float(v[i]) * to_float(v[i]);
        }
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / static_cast<float>(p.size) + p.eps);
    pdl_launch_dependents();

    const auto write = [&](int64_t piece, const Vec<T, kVec>& v) {
        const auto w = load_vec<kVec>(weight + piece * kVec);
        Vec<T, kVec> y;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            y[i] = from_float<T>(to_float(v[i]) * scale * to_float(w[i]));
        }
        store_vec(out + piece * kVec, y);
    };
#pragma unroll
    for (int j = 0; j < kMaxPieces; ++j) {
        const int64_t piece = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
        if (piece < num_pieces) {
            write(piece, kept[j]);
        }
    }
    for (int64_t piece = threadIdx.x + static_cast<int64_t>(kMaxPieces) * blockDim.x; piece < num_pieces;
         piece += blockDim.x) {
        write(piece, load_vec<kVec>(x + piece * kVec));
    }
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& p, void* stream) {
    const int64_t rows = p.num_tokens * p.num_heads;
    if (rows == 0 || p.size == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kVec>() {
            // Two pieces a thread hide latency; a warp is the least.
            const int64_t pieces = p.size / kVec;
            const int64_t warps = (pieces / 2 + 31) / 32;
            const int threads = static_cast<int>(warps < 1 ? 32 : warps > 32 ? kMaxThreads : warps * 32);
            launch(rms_norm_kernel<T, kVec>, {.grid = dim3(rows), .block = dim3(threads), .pdl = true}, stream, p);
        };
        constexpr int kWide = kVecElements<T>;
        const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                             reinterpret_cast<uintptr_t>(p.out);
        const auto strides = p.x_token_stride | p.x_head_stride | p.out_token_stride | p.out_head_stride | p.size;
        if (address % 16 == 0 && strides % kWide == 0) {
            run.template operator()<kWide>();
        } else {
            run.template operator()<1>();
        }
    });
}

}  // namespace fastkernels
