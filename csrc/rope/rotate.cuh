// What rope and rope_append_kv share: one kernel over the heads of q and k (and v).
//
//   q, q_out  [num_tokens, num_q_heads, head_dim]      k, v, k_out  [num_tokens, num_kv_heads, head_dim]
//   cos_sin   [max_position, rotary_dim] fp32          kv_cache     [num_pages, 2, num_kv_heads, page_size, head_dim]
//
// rope_kernel: a thread owns one unit: kVec pairs of a head of q or k (two 16-byte pieces; one pair where the addresses
// or sizes are odd), or kVec elements of what is copied (the rest of a head past rotary_dim, and v). A token's units
// are spread over as many blocks as they fill. rope_heads_kernel, for few tokens whose whole heads turn: a thread owns
// the same unit of kRopeHeads heads of q, k and v, which share its cosines, and has worked out its addresses before
// pdl_wait(); v's pieces pass as they are. The pairs turn in fp32 and round once. Bytes a token: 2 * (num_q_heads +
// num_kv_heads, twice with v) * head_dim * sizeof(T), and rotary_dim * 4 of cos_sin, which its heads share in L1.
#pragma once

#include <algorithm>

#include "common/convert.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "fastkernels/kv_cache.h"
#include "fastkernels/rope.h"

namespace fastkernels {

inline constexpr int kRopeThreads = 128;            // of rope_kernel
inline constexpr int kRopeHeadsThreads = 256;       // of rope_heads_kernel
inline constexpr int kRopeManyTokens = 256;         // from here on rope_kernel: its small blocks keep memory busier
inline constexpr int kRopeHeads = 2;                // of a thread of rope_heads_kernel
inline constexpr unsigned kRopeThreadsPerSm = 576;  // that its registers leave room for

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

template <typename T, int kVec, bool kInterleaved, bool kAppend>
__global__ void __launch_bounds__(kRopeHeadsThreads)
    rope_heads_kernel(const RopeParams p, unsigned blocks_per_token, int head_stride) {
    // Thread i of a token owns unit i % units of the heads i / units and i / units + head_stride.
    constexpr int kHeads = kRopeHeads;
    const unsigned num_tokens = static_cast<unsigned>(p.num_tokens), token_stride = gridDim.x / blocks_per_token;
    unsigned token = blockIdx.x / blocks_per_token;
    const int i = (blockIdx.x - token * blocks_per_token) * blockDim.x + threadIdx.x;
    const int half = p.head_dim / 2, units = half / kVec;
    const int first_head = i / units, unit = i - first_head * units;
    const int first_at = kInterleaved ? 2 * unit * kVec : unit * kVec;
    const int second_at = kInterleaved ? first_at + kVec : half + first_at;
    const int k_heads_end = p.num_q_heads + p.num_kv_heads, heads_end = k_heads_end + (kAppend ? p.num_kv_heads : 0);
    if (first_head >= head_stride) {
        return;
    }
    const T* from[kHeads];
    T* to[kHeads];
    int64_t from_stride[kHeads], to_stride[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
        const int head = first_head + j * head_stride;
        if (head < p.num_q_heads) {
            from[j] = static_cast<const T*>(p.q) + head * p.q_head_stride;
            from_stride[j] = p.q_token_stride;
            to[j] = static_cast<T*>(p.q_out) + head * p.q_out_head_stride;
            to_stride[j] = p.q_out_token_stride;
        } else {
            const bool is_v = kAppend && head >= k_heads_end;
            const int kv_head = head - (is_v ? k_heads_end : p.num_q_heads);
            from[j] = static_cast<const T*>(is_v ? p.v : p.k) + kv_head * (is_v ? p.v_head_stride : p.k_head_stride);
            from_stride[j] = is_v ? p.v_token_stride : p.k_token_stride;
            to[j] = kAppend ? static_cast<T*>(p.kv_cache) +
                                  (static_cast<int64_t>(is_v) * p.num_kv_heads + kv_head) * p.page_size * p.head_dim
                            : static_cast<T*>(p.k_out) + kv_head * p.k_out_head_stride;
            to_stride[j] = p.k_out_token_stride;
        }
    }
    const int64_t page_elements = int64_t{2} * p.num_kv_heads * p.page_size * p.head_dim;
    const unsigned page_size = static_cast<unsigned>(p.page_size);
    pdl_launch_dependents();
    pdl_wait();

    Vec<T, kVec> first[kHeads], second[kHeads], next_first[kHeads], next_second[kHeads];
    const auto load = [&](unsigned at, Vec<T, kVec>(&a)[kHeads], Vec<T, kVec>(&b)[kHeads]) {
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
            if (at < num_tokens && first_head + j * head_stride < heads_end) {
                a[j] = load_once<kVec>(from[j] + at * from_stride[j] + first_at);
                b[j] = load_once<kVec>(from[j] + at * from_stride[j] + second_at);
            }
        }
    };
    const float* cos_sin = cos_sin_row(p, token);
    load(token, first, second);
    for (; token < num_tokens; token += token_stride) {
        float cosine[kVec], sine[kVec];
        load_floats(cos_sin + unit * kVec, cosine);
        load_floats(cos_sin + half + unit * kVec, sine);
        const int64_t slot = kAppend ? p.slot_mapping[token] : 0;
        // A token ahead: the next one's pieces, and its row of the table.
        const unsigned next = token + token_stride;
        load(next, next_first, next_second);
        if (next < num_tokens) {
            cos_sin = cos_sin_row(p, next);
        }
        const bool has_slot = !kAppend || (slot >= 0 && slot < p.num_pages * p.page_size);
        int64_t slot_at = 0;
        if constexpr (kAppend) {
            const int64_t page = slot >> 32 == 0 ? static_cast<unsigned>(slot) / page_size : slot / p.page_size;
            slot_at = page * page_elements + (slot - page * p.page_size) * p.head_dim;
        }
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
            const int head = first_head + j * head_stride;
            const bool is_q = head < p.num_q_heads;
            forget(first[j]);  // not turned to floats before their time
            forget(second[j]);
            if (head < k_heads_end) {
                turn<T, kVec, kInterleaved>(first[j], second[j], cosine, sine);
            }
            if (head < heads_end && (is_q || has_slot)) {
                T* out = to[j] + (kAppend && !is_q ? slot_at : token * to_stride[j]);
                store_vec(out + first_at, first[j]);
                store_vec(out + second_at, second[j]);
            }
            first[j] = next_first[j];
            second[j] = next_second[j];
        }
    }
}

template <typename T, int kVec, bool kInterleaved, bool kAppend>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const RopeParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    int unit = blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x;
    const int half = p.rotary_dim / 2, rotated_units = half / kVec;
    const int units_per_head = rotated_units + (p.head_dim - p.rotary_dim) / kVec;
    const int q_units = p.num_q_heads * units_per_head, k_units = p.num_kv_heads * units_per_head;
    const int v_units_per_head = p.head_dim / kVec;
    pdl_launch_dependents();
    pdl_wait();

    // Which head this unit is of, where from, where to.
    const T* from;
    T* to;
    if (unit < q_units) {
        const int head = unit / units_per_head;
        unit -= head * units_per_head;
        from = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
        to = static_cast<T*>(p.q_out) + token * p.q_out_token_stride + head * p.q_out_head_stride;
    } else {
        unit -= q_units;
        const bool is_v = kAppend && unit >= k_units;
        if (is_v) {
            unit -= k_units;
        }
        const int head = unit / (is_v ? v_units_per_head : units_per_head);
        if (head >= p.num_kv_heads) {
            return;  // past the token's last unit
        }
        unit -= head * (is_v ? v_units_per_head : units_per_head);
        from = is_v ? static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride
                    : static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride;
        if constexpr (kAppend) {
            const int64_t slot = p.slot_mapping[token];
            if (slot < 0 || slot >= p.num_pages * p.page_size) {
                return;
            }
            to = static_cast<T*>(p.kv_cache) +
                 kv_cache_offset(slot, is_v, head, p.num_kv_heads, p.page_size, p.head_dim);
        } else {
            to = static_cast<T*>(p.k_out) + token * p.k_out_token_stride + head * p.k_out_head_stride;
        }
        if (is_v) {
            store_vec(to + unit * kVec, load_vec<kVec>(from + unit * kVec));
            return;
        }
    }
    if (unit >= rotated_units) {
        const int at = p.rotary_dim + (unit - rotated_units) * kVec;
        store_vec(to + at, load_vec<kVec>(from + at));
        return;
    }
    const float* cos_sin = cos_sin_row(p, token);
    const int first_at = kInterleaved ? 2 * unit * kVec : unit * kVec;
    const int second_at = kInterleaved ? first_at + kVec : half + first_at;
    auto first = load_vec<kVec>(from + first_at), second = load_vec<kVec>(from + second_at);
    float cosine[kVec], sine[kVec];
    load_floats(cos_sin + unit * kVec, cosine);
    load_floats(cos_sin + half + unit * kVec, sine);
    turn<T, kVec, kInterleaved>(first, second, cosine, sine);
    store_vec(to + first_at, first);
    store_vec(to + second_at, second);
}

template <bool kAppend>
void launch_rope(const RopeParams& p, void* stream) {
    if (p.num_tokens == 0 || p.num_q_heads + p.num_kv_heads == 0 || p.head_dim == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kVec, bool kInterleaved>() {
            const int64_t per_head = (p.rotary_dim / 2 + p.head_dim - p.rotary_dim) / kVec;
            const int64_t units = (p.num_q_heads + p.num_kv_heads) * per_head +
                                  (kAppend ? int64_t{p.num_kv_heads} * (p.head_dim / kVec) : 0);
            const auto threads = static_cast<unsigned>(std::min<int64_t>(kRopeThreads, (units + 31) / 32 * 32));
            const auto blocks_per_token = static_cast<unsigned>((units + threads - 1) / threads);
            launch(rope_kernel<T, kVec, kInterleaved, kAppend>,
                   {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token),
                    .block = dim3(threads),
                    .pdl = true},
                   stream, p, blocks_per_token);
        };
        const auto run_heads = [&]<int kVec, bool kInterleaved>() {
            const int heads = p.num_q_heads + (kAppend ? 2 : 1) * p.num_kv_heads;
            const int head_stride = (heads + kRopeHeads - 1) / kRopeHeads;
            const int units = head_stride * (p.head_dim / 2 / kVec);
            const auto blocks_per_token = static_cast<unsigned>((units + kRopeHeadsThreads - 1) / kRopeHeadsThreads);
            const unsigned threads = (units + blocks_per_token - 1) / blocks_per_token;
            const unsigned at_once = num_sms() * std::max(1u, kRopeThreadsPerSm / ((threads + 31) / 32 * 32));
            const unsigned tokens = std::min(static_cast<unsigned>(p.num_tokens), at_once / blocks_per_token + 1);
            launch(rope_heads_kernel<T, kVec, kInterleaved, kAppend>,
                   {.grid = dim3(tokens * blocks_per_token), .block = dim3(threads), .pdl = true}, stream, p,
                   blocks_per_token, head_stride);
        };
        const auto run_layout = [&]<int kVec, bool kInterleaved>() {
            if constexpr (kVec == 1) {
                run.template operator()<kVec, kInterleaved>();
            } else if (p.rotary_dim != p.head_dim || p.num_tokens >= kRopeManyTokens) {
                run.template operator()<kVec, kInterleaved>();
            } else {
                run_heads.template operator()<kVec, kInterleaved>();
            }
        };
        const auto run_width = [&]<int kVec>() {
            if (p.interleaved) {
                run_layout.template operator()<kVec, true>();
            } else {
                run_layout.template operator()<kVec, false>();
            }
        };
        constexpr int kWide = kVecElements<T>;
        const auto address = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                             reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.q_out) |
                             reinterpret_cast<uintptr_t>(p.k_out) | reinterpret_cast<uintptr_t>(p.kv_cache) |
                             reinterpret_cast<uintptr_t>(p.cos_sin);
        const auto strides = p.q_token_stride | p.q_head_stride | p.k_token_stride | p.k_head_stride |
                             p.v_token_stride | p.v_head_stride | p.q_out_token_stride | p.q_out_head_stride |
                             p.k_out_token_stride | p.k_out_head_stride | p.head_dim | (p.rotary_dim / 2);
        if (address % 16 == 0 && strides % kWide == 0) {
            run_width.template operator()<kWide>();
        } else {
            run_width.template operator()<1>();
        }
    });
}

}  // namespace fastkernels
