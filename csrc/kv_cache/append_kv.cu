// kv_cache[page, 0 | 1, head, offset] = k | v[token, head], with slot_mapping[token] = page * page_size + offset.
//
//   k, v      [num_tokens, num_kv_heads, head_dim], any token and head stride     slot_mapping  [num_tokens] int64
//   kv_cache  [num_pages, 2, num_kv_heads, page_size, head_dim]
//
// A thread owns one unit of 16 bytes (or one element where the addresses are odd) of a token's k and of its v; a
// token's units are spread over as many blocks as they fill. Bytes: 4 * num_kv_heads * head_dim * sizeof(element) a
// token.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/pdl.cuh"
#include "common/vec.cuh"
#include "fastkernels/kv_cache.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 128;

// Sizes and strides of p are in Units here, as the launcher rescaled them.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) append_kv_kernel(const AppendKvParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const unsigned unit = blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x;
    pdl_launch_dependents();
    pdl_wait();
    if (unit >= static_cast<unsigned>(p.num_kv_heads) * p.head_dim) {
        return;
    }
    const int64_t slot = p.slot_mapping[token];
    const unsigned head = unit / p.head_dim, at = unit % p.head_dim;
    // These do not wait for the slot.
    const Unit k = static_cast<const Unit*>(p.k)[token * p.k_token_stride + head * p.k_head_stride + at];
    const Unit v = static_cast<const Unit*>(p.v)[token * p.v_token_stride + head * p.v_head_stride + at];
    if (slot < 0 || slot >= p.num_pages * p.page_size) {
        return;
    }
    Unit* cache = static_cast<Unit*>(p.kv_cache);
    cache[kv_cache_offset(slot, 0, head, p.num_kv_heads, p.page_size, p.head_dim) + at] = k;
    cache[kv_cache_offset(slot, 1, head, p.num_kv_heads, p.page_size, p.head_dim) + at] = v;
}

template <int kVec, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&x)[kVec]) {
    constexpr int kAtOnce = kVec < kVecElements<T> ? kVec : kVecElements<T>;
#pragma unroll
    for (int i = 0; i < kVec; i += kAtOnce) {
        const auto piece = load_vec<kAtOnce>(from + i);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            x[i + j] = to_float(piece[j]);
        }
    }
}

// A cache of bytes: a thread owns kVec elements of one token's k and of its v.
template <typename T, typename Byte, int kVec>
__global__ void __launch_bounds__(kThreads) append_bytes_kernel(const AppendKvParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const unsigned unit = blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x;
    const unsigned units_per_head = p.head_dim / kVec;
    pdl_launch_dependents();
    pdl_wait();
    if (unit >= p.num_kv_heads * units_per_head) {
        return;
    }
    const int64_t slot = p.slot_mapping[token];
    const unsigned head = unit / units_per_head, at = unit % units_per_head * kVec;
    float k[kVec], v[kVec];
    load_floats(static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride + at, k);
    load_floats(static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride + at, v);
    if (slot < 0 || slot >= p.num_pages * p.page_size) {
        return;
    }
    const auto store = [&](int kv, float (&x)[kVec], const float* scales) {
        uint8_t* to = static_cast<uint8_t*>(p.kv_cache) + at +
                      kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
        store_bytes<Byte>(to, x, scales != nullptr ? scales[head] : 1.0f);
    };
    store(0, k, p.k_scale);
    store(1, v, p.v_scale);
}

void append_bytes(const AppendKvParams& p, void* stream) {
    const auto address = reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v);
    const auto strides = p.k_token_stride | p.k_head_stride | p.v_token_stride | p.v_head_stride | p.head_dim;
    const bool wide = address % 16 == 0 && strides % 8 == 0 && reinterpret_cast<uintptr_t>(p.kv_cache) % 8 == 0;
    visit_float(p.dtype, [&]<typename T>() {
        visit_byte(p.kv_dtype, [&]<typename Byte>() {
            const auto run = [&]<int kVec>() {
                const int64_t units = int64_t{p.num_kv_heads} * (p.head_dim / kVec);
                const unsigned threads = static_cast<unsigned>(std::min<int64_t>(kThreads, (units + 31) / 32 * 32));
                const auto blocks_per_token = static_cast<unsigned>((units + threads - 1) / threads);
                launch(append_bytes_kernel<T, Byte, kVec>,
                       {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token),
                        .block = dim3(threads),
                        .pdl = true},
                       stream, p, blocks_per_token);
            };
            if (wide) {
                run.template operator()<8>();
            } else {
                run.template operator()<1>();
            }
        });
    });
}

}  // namespace

void append_kv_cuda(const AppendKvParams& p, void* stream) {
    if (p.num_tokens == 0 || p.num_kv_heads == 0 || p.head_dim == 0) {
        return;
    }
    if (p.kv_dtype != p.dtype) {
        append_bytes(p, stream);
        return;
    }
    const auto run = [&]<typename Unit>() {
        const auto elements = static_cast<int32_t>(sizeof(Unit) / size_bytes(p.dtype));
        AppendKvParams in_units = p;
        in_units.head_dim /= elements;
        for (int64_t* stride :
             {&in_units.k_token_stride, &in_units.k_head_stride, &in_units.v_token_stride, &in_units.v_head_stride}) {
            *stride /= elements;
        }
        const int64_t units = int64_t{in_units.num_kv_heads} * in_units.head_dim;
        const unsigned threads = static_cast<unsigned>(std::min<int64_t>(kThreads, (units + 31) / 32 * 32));
        const auto blocks_per_token = static_cast<unsigned>((units + threads - 1) / threads);
        launch(
            append_kv_kernel<Unit>,
            {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token), .block = dim3(threads), .pdl = true},
            stream, in_units, blocks_per_token);
    };
    const auto bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const auto address =
        reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.kv_cache);
    const auto strides = p.k_token_stride | p.k_head_stride | p.v_token_stride | p.v_head_stride | p.head_dim;
    if (address % 16 == 0 && strides * bytes % 16 == 0) {
        run.template operator()<uint4>();
    } else if (bytes == 4) {
        run.template operator()<uint32_t>();
    } else {
        run.template operator()<uint16_t>();
    }
}

}  // namespace fastkernels
