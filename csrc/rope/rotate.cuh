// What rope and rope_append_kv share: one kernel over the heads of q and k (and v).
//
//   q, q_out  [num_tokens, num_q_heads, head_dim]      k, v, k_out  [num_tokens, num_kv_heads, head_dim]
//   cos_sin   [max_position, rotary_dim] fp32          kv_cache     [num_pages, 2, num_kv_heads, page_size, head_dim]
//
// A thread owns one unit of one head: kVec pairs of q or k, in two pieces of 16 bytes (one pair where the addresses or
// sizes are odd), or two neighbouring pieces of what is copied, v and the dimensions past rotary_dim. A block has as
// many heads of a token as fill it, the units of a head along x. Before pdl_wait() addresses are worked out, and the
// token's position and slot are brought to L2. The pairs turn in fp32 and round once; a cache of bytes takes them
// rounded, divided by the scales of their heads. Bytes a token: 2 * (num_q_heads + num_kv_heads, twice with v) *
// head_dim * sizeof(T), and rotary_dim * 4 of cos_sin, which its heads share in L1.
#pragma once

#include <algorithm>

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "fastkernels/kv_cache.h"
#include "fastkernels/rope.h"

namespace fastkernels {

inline constexpr int kRopeThreads = 128;
inline constexpr int kRopeMinBlocks = 12;  // of an SM, for which the registers are to leave room

template <int kVec>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[kVec]) {
    if constexpr (kVec % 4 == 0) {
#pragma unroll
        for (int j = 0; j < kVec; j += 4) {
            const auto v = load_vec<4>(p + j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[j + i] = v[i];
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            out[i] = p[i];
        }
    }
}

// The pairs of two pieces turned: pairs (first[i], second[i]), or interleaved, 2 kVec elements in a row.
template <typename T, int kVec, bool kInterleaved>
__device__ __forceinline__ void turn(Vec<T, kVec>& first, Vec<T, kVec>& second, const float (&cosine)[kVec],
                                     const float (&sine)[kVec]) {
    float in[2][kVec], turned[2][kVec];
    to_floats(first, in[0]);
    to_floats(second, in[1]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const int a = kInterleaved ? 2 * i : i, b = kInterleaved ? 2 * i + 1 : kVec + i;
        const float x = in[a / kVec][a % kVec], y = in[b / kVec][b % kVec];
        turned[a / kVec][a % kVec] = fmaf(x, cosine[i], -(y * sine[i]));
        turned[b / kVec][b % kVec] = fmaf(y, cosine[i], x * sine[i]);
    }
    first = from_floats<T>(turned[0]);
    second = from_floats<T>(turned[1]);
}

__device__ __forceinline__ const float* cos_sin_row(const RopeParams& p, int64_t token) {
    int64_t position = p.position_dtype == DType::i32 ? static_cast<const int32_t*>(p.positions)[token]
                                                      : static_cast<const int64_t*>(p.positions)[token];
    position = position < 0 ? 0 : position >= p.max_position ? p.max_position - 1 : position;
    return p.cos_sin + position * p.rotary_dim;
}

// Cache is the type of kv_cache's elements, void for rope alone.
template <typename T, typename Cache, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads, kRopeMinBlocks)
    rope_kernel(const __grid_constant__ RopeParams p, unsigned blocks_per_token) {
    constexpr bool kAppend = !std::is_void_v<Cache>;
    const unsigned token = blockIdx.x / blocks_per_token;
    const int head = static_cast<int>((blockIdx.x - token * blocks_per_token) * blockDim.y + threadIdx.y);
    const int unit = static_cast<int>(kVec > 1 ? threadIdx.x : blockIdx.y * blockDim.x + threadIdx.x);
    const int half = p.rotary_dim / 2, turned_units = half / kVec;
    const int units = turned_units + (p.head_dim - p.rotary_dim + 2 * kVec - 1) / (2 * kVec);
    const int k_heads_end = p.num_q_heads + p.num_kv_heads;
    if ((kVec == 1 && unit >= units) || head >= k_heads_end + (kAppend ? p.num_kv_heads : 0)) {
        return;
    }
    // From where to where; the slot, which a kernel before this one may write, is still to come.
    const bool is_q = head < p.num_q_heads, is_v = kAppend && head >= k_heads_end;
    const bool turns = !is_v && unit < turned_units;
    const int first_at = turns && !kInterleaved ? unit * kVec : 2 * unit * kVec;
    const int apart = turns && !kInterleaved ? half : kVec;
    const bool has_second = first_at + apart < p.head_dim;
    const int kv_head = head - (is_q ? 0 : is_v ? k_heads_end : p.num_q_heads);
    const T* from =
        first_at + (is_q   ? static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride
                    : is_v ? static_cast<const T*>(p.v) + token * p.v_token_stride + kv_head * p.v_head_stride
                           : static_cast<const T*>(p.k) + token * p.k_token_stride + kv_head * p.k_head_stride);
    T* to = first_at + (is_q ? static_cast<T*>(p.q_out) + token * p.q_out_token_stride + head * p.q_out_head_stride
                             : static_cast<T*>(p.k_out) + token * p.k_out_token_stride + kv_head * p.k_out_head_stride);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        prefetch_l2(static_cast<const char*>(p.positions) + token * (p.position_dtype == DType::i32 ? 4 : 8));
        if constexpr (kAppend) {
            prefetch_l2(p.slot_mapping + token);
        }
    }
    pdl_launch_dependents();
    pdl_wait();

    Vec<T, kVec> first = load_vec<kVec>(from), second{};
    if (has_second) {
        second = load_vec<kVec>(from + apart);
    }
    if (turns) {
        const float* cos_sin = cos_sin_row(p, token) + unit * kVec;
        float cosine[kVec], sine[kVec];
        load_floats(cos_sin, cosine);
        load_floats(cos_sin + half, sine);
        turn<T, kVec, kInterleaved>(first, second, cosine, sine);
    }
    if constexpr (kAppend) {
        if (!is_q) {
            const int64_t slot = p.slot_mapping[token];
            if (slot < 0 || slot >= p.num_pages * p.page_size) {
                return;
            }
            auto* cache = static_cast<Cache*>(p.kv_cache) + first_at +
                          kv_cache_offset(slot, is_v, kv_head, p.num_kv_heads, p.page_size, p.head_dim);
            if constexpr (kIsByte<Cache>) {
                const float* scales = is_v ? p.v_scale : p.k_scale;
                const float scale = scales != nullptr ? scales[kv_head] : 1.0f;
                const auto store = [&](const Vec<T, kVec>& elements, int at) {
                    float x[kVec];
                    to_floats(elements, x);
                    if (!is_v && p.k_offset != nullptr) {
                        float offset[kVec];
                        load_floats(p.k_offset + kv_head * p.head_dim + first_at + at, offset);
#pragma unroll
                        for (int i = 0; i < kVec; ++i) {
                            x[i] -= offset[i];
                        }
                    }
                    store_bytes<Cache>(cache + at, x, scale);
                };
                store(first, 0);
                if (has_second) {
                    store(second, apart);
                }
                return;
            } else {
                to = cache;
            }
        }
    }
    store_vec(to, first);
    if (has_second) {
        store_vec(to + apart, second);
    }
}

template <typename T, typename Cache>
void launch_rope(const RopeParams& p, void* stream) {
    constexpr bool kAppend = !std::is_void_v<Cache>;
    if (p.num_tokens == 0 || p.num_q_heads + p.num_kv_heads == 0 || p.head_dim == 0) {
        return;
    }
    const auto run = [&]<int kVec, bool kInterleaved>() {
        const int units = p.rotary_dim / 2 / kVec + (p.head_dim - p.rotary_dim + 2 * kVec - 1) / (2 * kVec);
        const int heads = p.num_q_heads + (kAppend ? 2 : 1) * p.num_kv_heads;
        const int across = std::min(units, kRopeThreads), down = std::min(heads, kRopeThreads / across);
        const auto blocks_per_token = static_cast<unsigned>((heads + down - 1) / down);
        const auto parts_of_head = static_cast<unsigned>((units + across - 1) / across);
        launch(rope_kernel<T, Cache, kVec, kInterleaved>,
               {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token, parts_of_head),
                .block = dim3(across, down),
                .pdl = true},
               stream, p, blocks_per_token);
    };
    const auto run_width = [&]<int kVec>() {
        if (p.interleaved) {
            run.template operator()<kVec, true>();
        } else {
            run.template operator()<kVec, false>();
        }
    };
    constexpr int kWide = kVecElements<T>;
    const auto address = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                         reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.q_out) |
                         reinterpret_cast<uintptr_t>(p.k_out) | reinterpret_cast<uintptr_t>(p.kv_cache) |
                         reinterpret_cast<uintptr_t>(p.cos_sin) | reinterpret_cast<uintptr_t>(p.k_offset);
    const auto strides = p.q_token_stride | p.q_head_stride | p.k_token_stride | p.k_head_stride | p.v_token_stride |
                         p.v_head_stride | p.q_out_token_stride | p.q_out_head_stride | p.k_out_token_stride |
                         p.k_out_head_stride | p.head_dim | (p.rotary_dim / 2);
    if (address % 16 == 0 && strides % kWide == 0 && p.head_dim <= 2 * kWide * kRopeThreads) {
        run_width.template operator()<kWide>();
    } else {
        run_width.template operator()<1>();
    }
}

}  // namespace fastkernels
