// rope_append_kv into a cache of one-byte elements: q turned into q_out, k turned and rounded to its dtype, then k and
// v divided by the scales of their heads, rounded to nearest and saturated.
//
// Shapes and the formula: fastkernels/rope.h. A thread owns one pair of q or k, or two neighbouring elements of what is
// not turned, of one head; a token's pairs are spread over as many blocks as they fill.
// Bytes a token: (4 * num_q_heads + 6 * num_kv_heads) * head_dim in bf16.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/pdl.cuh"
#include "fastkernels/kv_cache.h"
#include "fastkernels/rope.h"
#include "rope/rope_append_kv_bytes.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 128;

template <typename T, typename Byte>
__global__ void __launch_bounds__(kThreads) rope_append_bytes_kernel(const RopeParams p, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const int pairs = (p.head_dim + 1) / 2, half = p.rotary_dim / 2;
    const int at = blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x;
    int head = at / pairs;
    const int pair = at - head * pairs;
    pdl_wait();
    pdl_launch_dependents();
    if (head >= p.num_q_heads + 2 * p.num_kv_heads) {
        return;
    }
    const bool is_q = head < p.num_q_heads, is_v = head >= p.num_q_heads + p.num_kv_heads;
    head -= is_q ? 0 : is_v ? p.num_q_heads + p.num_kv_heads : p.num_q_heads;
    const T* from = is_q   ? static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride
                    : is_v ? static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride
                           : static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride;

    // Elements first and second of the head; past its end where head_dim is odd.
    const bool turns = !is_v && pair < half;
    const int first = turns && !p.interleaved ? pair : 2 * pair,
              second = turns && !p.interleaved ? half + pair : first + 1;
    const bool has_second = second < p.head_dim;
    T x = from[first], y = has_second ? from[second] : x;
    if (turns) {
        int64_t position = p.position_dtype == DType::i32 ? static_cast<const int32_t*>(p.positions)[token]
                                                          : static_cast<const int64_t*>(p.positions)[token];
        position = position < 0 ? 0 : position >= p.max_position ? p.max_position - 1 : position;
        const float* cos_sin = p.cos_sin + position * p.rotary_dim;
        const float cosine = cos_sin[pair], sine = cos_sin[half + pair], a = to_float(x), b = to_float(y);
        x = from_float<T>(fmaf(a, cosine, -(b * sine)));
        y = from_float<T>(fmaf(b, cosine, a * sine));
    }
    if (is_q) {
        T* to = static_cast<T*>(p.q_out) + token * p.q_out_token_stride + head * p.q_out_head_stride;
        to[first] = x;
        if (has_second) {
            to[second] = y;
        }
        return;
    }
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_pages * p.page_size) {
        return;
    }
    const float* scales = is_v ? p.v_scale : p.k_scale;
    const float scale = scales != nullptr ? scales[head] : 1.0f;
    auto* to =
        static_cast<uint8_t*>(p.kv_cache) + kv_cache_offset(slot, is_v, head, p.num_kv_heads, p.page_size, p.head_dim);
    to[first] = to_byte<Byte>(__fdiv_rn(to_float(x), scale));
    if (has_second) {
        to[second] = to_byte<Byte>(__fdiv_rn(to_float(y), scale));
    }
}

}  // namespace

void rope_append_kv_bytes(const RopeParams& p, void* stream) {
    if (p.num_tokens == 0 || p.num_q_heads + p.num_kv_heads == 0 || p.head_dim == 0) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        visit_byte(p.kv_dtype, [&]<typename Byte>() {
            const int64_t pairs = int64_t{p.num_q_heads + 2 * p.num_kv_heads} * ((p.head_dim + 1) / 2);
            const auto blocks_per_token = static_cast<unsigned>((pairs + kThreads - 1) / kThreads);
            launch(rope_append_bytes_kernel<T, Byte>,
                   {.grid = dim3(static_cast<unsigned>(p.num_tokens) * blocks_per_token),
                    .block = dim3(kThreads),
                    .pdl = true},
                   stream, p, blocks_per_token);
        });
    });
}

}  // namespace fastkernels
