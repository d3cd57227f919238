// out = x * (1 / scale) + zero, int8, with a scale and a zero point a token (fastkernels/quant.h).
// A block owns a token. It reads its row twice, the second time from L1 or L2: for the range, and for the bytes.
// Bytes: size * (sizeof(T) + 1) a token.
#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "fastkernels/quant.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float clamp_byte(float x) {
    return fminf(fmaxf(x, -kMostWithZero), kMostWithZero);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_zeros_kernel(const QuantizeZerosParams p) {
    constexpr int kVec = kVecElements<T>;
    __shared__ float scratch[3][kThreads / 32];
    const int size = static_cast<int>(p.size), warp = threadIdx.x / 32;
    const T* from = static_cast<const T*>(p.x) + blockIdx.x * p.x_token_stride;
    pdl_launch_dependents();
    pdl_wait();
    float below = 0.0f, above = 0.0f, bad = 0.0f;  // 0 x NaN and 0 x infinity are NaN
    for (int at = threadIdx.x * kVec; at < size; at += kThreads * kVec) {
        float x[kVec];
        to_floats(load_vec<kVec>(from + at), x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            below = fmaxf(below, -x[i]);
            above = fmaxf(above, x[i]);
            bad += x[i] * 0.0f;
        }
    }
    below = warp_max(below);
    above = warp_max(above);
    bad = warp_sum(bad);
    if (threadIdx.x % 32 == 0) {
        scratch[0][warp] = below;
        scratch[1][warp] = above;
        scratch[2][warp] = bad;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) {
        below = fmaxf(below, scratch[0][i]);
        above = fmaxf(above, scratch[1][i]);
        bad += scratch[2][i];
    }
    constexpr float kSteps = 2.0f * kMostWithZero;
    const float scale = fmaxf(above / kSteps + below / kSteps, kLeastScale) + bad, inverse = 1.0f / scale;
    const float zero = clamp_byte(rintf(below * inverse) - kMostWithZero);
    if (threadIdx.x == 0) {
        p.scales[blockIdx.x] = scale;
        p.zeros[blockIdx.x] = static_cast<int32_t>(zero);
    }
    int8_t* to = p.out + blockIdx.x * p.out_token_stride;
    for (int at = threadIdx.x * kVec; at < size; at += kThreads * kVec) {
        float x[kVec];
        to_floats(load_vec<kVec>(from + at), x);
        Vec<int8_t, kVec> bytes;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            bytes[i] = static_cast<int8_t>(clamp_byte(rintf(x[i] * inverse) + zero));
        }
        store_vec(to + at, bytes);
    }
}

}  // namespace

void quantize_zeros_cuda(const QuantizeZerosParams& p, void* stream) {
    if (p.num_tokens == 0 || p.size == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        constexpr int kVec = kVecElements<T>;
        const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out);
        check(address % 16 == 0 && (p.x_token_stride | p.size) % kVec == 0 && p.out_token_stride % 16 == 0,
              "quantize_zeros: on CUDA the op takes addresses, rows and strides of whole 16 bytes");
        launch(quantize_zeros_kernel<T>,
               {.grid = dim3(static_cast<unsigned>(p.num_tokens)), .block = dim3(kThreads), .pdl = true}, stream, p);
    });
}

}  // namespace fastkernels
