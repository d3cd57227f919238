// kv_cache[page, 0 | 1, head, offset] = k | v[token, head], with slot_mapping[token] = page * page_size + offset.
//
//   k, v      [num_tokens, num_kv_heads, head_dim], any token and head stride     slot_mapping  [num_tokens] int64
//   kv_cache  [num_pages, 2, num_kv_heads, page_size, head_dim]
//
// A thread owns one unit of 16 bytes (or one element where the addresses are odd) of one token's k and v; a token's
// units are spread over as many blocks as they fill. Bytes: 4 * num_kv_heads * head_dim * sizeof(element) a token.
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
    const unsigned units = static_cast<unsigned>(p.num_kv_heads) * p.head_dim;
    pdl_launch_dependents();
    pdl_wait();
    if (unit >= 2 * units) {
        return;
    }
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_pages * p.page_size) {
        return;
    }
    const int kv = unit >= units;
    const unsigned head = (unit - kv * units) / p.head_dim, at = (unit - kv * units) % p.head_dim;
    const Unit* from = kv ? static_cast<const Unit*>(p.v) + token * p.v_token_stride + head * p.v_head_stride
                          : static_cast<const Unit*>(p.k) + token * p.k_token_stride + head * p.k_head_stride;
    Unit* to =
        static_cast<Unit*>(p.kv_cache) + kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim);
    to[at] = from[at];
}

// A cache of bytes: a thread owns kVec elements of one token's k or v.
template <typename T, typename Byte, int kVec>
__global__ void __launch_bounds__(kThreads) append_bytes_kernel(const AppendKvParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const unsigned unit = blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x;
    const unsigned units_per_head = p.head_dim / kVec, units = p.num_kv_heads * units_per_head;
    pdl_launch_dependents();
    pdl_wait();
    if (unit >= 2 * units) {
        return;
    }
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_pages * p.page_size) {
        return;
    }
    const int kv = unit >= units;
    const unsigned head = (unit - kv * units) / units_per_head, at = (unit - kv * units) % units_per_head * kVec;
    const T* from = kv ? static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride
                       : static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride;
    const float* scales = kv ? p.v_scale : p.k_scale;
    float x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i += kVecElements<T>) {
        constexpr int kAtOnce = kVec < kVecElements<T> ? kVec : kVecElements<T>;
        const auto piece = load_vec<kAtOnce>(from + at + i);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            x[i + j] = to_float(piece[j]);
        }
    }
    store_bytes<Byte>(static_cast<uint8_t*>(p.kv_cache) +
                          kv_cache_offset(slot, kv, head, p.num_kv_heads, p.page_size, p.head_dim) + at,
                      x, scales != nullptr ? scales[head] : 1.0f);
}

void append_bytes(const AppendKvParams& p, void* stream) {
    const auto address = reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v);
    const auto strides = p.k_token_stride | p.k_head_stride | p.v_token_stride | p.v_head_stride | p.head_dim;
    const bool wide = address % 16 == 0 && strides % 8 == 0 && reinterpret_cast<uintptr_t>(p.kv_cache) % 8 == 0;
    visit_float(p.dtype, [&]<typename T>() {
        visit_byte(p.kv_dtype, [&]<typename Byte>() {
            const auto run = [&]<int kVec>() {
                const int64_t units = int64_t{2} * p.num_kv_heads * (p.head_dim / kVec);
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
        const int64_t units = int64_t{2} * in_units.num_kv_heads * in_units.head_dim;
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
