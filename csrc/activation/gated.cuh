// What the gated activations share: out = f(gate) * up, with f in fp32 and one rounding at the end.
//
//   x  [num_tokens, 2 * size] (the gate, then up), any row stride     out  [num_tokens, size]
//
// A thread owns 16 bytes of the output (or one element where the addresses are odd); blocks are as small as it takes to
// reach every SM with one token. Bytes: 3 * size * sizeof(T) a token.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/quantize_rows.cuh"
#include "common/sigmoid.cuh"
#include "fastkernels/activation.h"

namespace fastkernels {

inline constexpr int kGatedMaxThreads = 256;

template <typename Activation, typename T, int kVec>
__global__ void __launch_bounds__(kGatedMaxThreads) gated_kernel(const GatedParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const int64_t at = (static_cast<int64_t>(blockIdx.x % blocks_per_token) * blockDim.x + threadIdx.x) * kVec;
    pdl_launch_dependents();
    pdl_wait();
    if (at >= p.size) {
        return;
    }
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + at;
    const auto gate = load_vec<kVec>(x), up = load_vec<kVec>(x + p.size);
    float y[kVec], z[kVec];
    to_floats(gate, y);
    to_floats(up, z);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        y[i] = Activation::template apply<T>(y[i]) * z[i];
    }
    store_vec(static_cast<T*>(p.out) + token * p.out_token_stride + at, from_floats<T>(y));
}

template <typename Activation>
void launch_gated(const GatedParams& p, void* stream) {
    if (p.num_tokens == 0 || p.size == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kVec>() {
            const int64_t pieces = p.size / kVec;
            const int64_t warps = (p.num_tokens * pieces / num_sms() + 31) / 32;
            const auto threads = static_cast<unsigned>(std::clamp<int64_t>(warps * 32, 32, kGatedMaxThreads));
            const auto blocks_per_token = static_cast<unsigned>((pieces + threads - 1) / threads);
            launch(gated_kernel<Activation, T, kVec>,
                   {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token),
                    .block = dim3(threads),
                    .pdl = true},
                   stream, p, blocks_per_token);
        };
        constexpr int kWide = kVecElements<T>;
        const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out);
        if (address % 16 == 0 && (p.x_token_stride | p.out_token_stride | p.size) % kWide == 0) {
            run.template operator()<kWide>();
        } else {
            run.template operator()<1>();
        }
    });
}

// Where the rows of the *_quant ops come from.
template <typename Activation, typename T>
struct GatedSource {
    const T* x;
    int64_t token_stride, size;

    struct Raw {
        Vec<T, kVecElements<T>> gate, up;
    };
    static constexpr bool kKeepsFloats = true;

    __device__ __forceinline__ Raw read(unsigned token, int at) const {
        const T* gate = x + token * token_stride + at;
        return {load_vec<kVecElements<T>>(gate), load_vec<kVecElements<T>>(gate + size)};
    }
    __device__ __forceinline__ void compute(const Raw& raw, float (&y)[kVecElements<T>]) const {
        float up[kVecElements<T>];
        to_floats(raw.gate, y);
        to_floats(raw.up, up);
#pragma unroll
        for (int i = 0; i < kVecElements<T>; ++i) {
            y[i] = Activation::template apply<T>(y[i]) * up[i];
        }
    }
};

template <typename Activation>
void launch_gated_quant(const char* op, const GatedParams& p, void* stream) {
    visit_float(p.dtype, [&]<typename T>() {
        launch_quantize<T>(op, GatedSource<Activation, T>{static_cast<const T*>(p.x), p.x_token_stride, p.size},
                           reinterpret_cast<uintptr_t>(p.x), p.x_token_stride,
                           {p.out, p.out_token_stride, p.num_tokens, p.size, p.bytes}, stream);
    });
}

}  // namespace fastkernels
