// What attention_decode and attention_mma share: the rows and keys of a work item, which keys a row sees, and the sum
// of the partial results of a tile that was split.
#pragma once

#include <algorithm>

#include "attention/attention_mma.h"
#include "common/ptx/atomic.cuh"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/ex2.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace fastkernels {
namespace {

constexpr float kNegInf = -INFINITY;

// Of a KV head of a cache of bytes.
template <typename KV>
__device__ __forceinline__ float scale_of(const float* scales, int kv_head) {
    return kIsByte<KV> && scales != nullptr ? scales[kv_head] : 1.0f;
}

// The token that a packed row is of; right for rows below 2^24 / group.
__device__ __forceinline__ int token_of_row(const AttentionMmaArgs& a, int row) {
    return static_cast<int>(static_cast<uint64_t>(row) * a.per_group >> 24);
}

// What a block works on: rows of a sequence, keys [begin, end).
struct Work {
    int first_row, rows;  // of the sequence's packed rows
    int q_begin;
    int q_offset;  // len_k - len_q: token i of the sequence is at position q_offset + i
    int first_position, last_position;
    int begin, end;
    int all_rows, row_offset;  // of the item's tile, and where these rows begin in it

    __device__ Work(const AttentionMmaArgs& a, const WorkItem& item, int tile_rows) {
        const AttentionParams& p = a.p;
        first_row = item.tile * tile_rows;
        rows = min(item.len_q * a.group - first_row, tile_rows);
        q_begin = item.q_begin;
        q_offset = item.len_k - item.len_q;
        first_position = q_offset + token_of_row(a, first_row);
        last_position = q_offset + token_of_row(a, first_row + rows - 1);
        all_rows = rows;
        row_offset = 0;
        if (p.tree_mask != nullptr && item.len_q <= 64) {  // all see what is before the first, and maybe the last
            first_position = q_offset - 1;
            last_position = item.len_k - 1;
        }
        end = p.causal ? min(item.len_k, last_position + 1) : item.len_k;
        begin = p.window > 0 ? max(0, first_position - p.window + 1) : 0;
        if (p.page_size >= 16) {
            begin &= ~15;  // so that 16 keys of a block lie in one page
        }
        const int blocks = max(0, end - begin + kTileKeys - 1) / kTileKeys;
        const int split_keys = (blocks + item.num_splits - 1) / item.num_splits * kTileKeys;
        begin += item.split * split_keys;
        end = min(end, begin + split_keys);
    }

    // Whether masks say which of the new tokens a token sees.
    __device__ bool tree() const {
        return first_position < q_offset;
    }

    // The rows from row_offset on, at most count of them.
    __device__ Work part(const AttentionMmaArgs& a, int offset, int count) const {
        Work w = *this;
        w.row_offset = offset;
        w.first_row = first_row + offset;
        w.rows = min(rows - offset, count);
        if (!tree()) {
            w.first_position = q_offset + token_of_row(a, w.first_row);
            w.last_position = q_offset + token_of_row(a, w.first_row + w.rows - 1);
            w.end = a.p.causal ? min(end, w.last_position + 1) : end;
        }
        return w;
    }

    // Whether some row does not see some key of the block of so many keys.
    __device__ bool crosses_edge(const AttentionMmaArgs& a, int block_begin, int keys) const {
        return block_begin + keys > end || (a.p.causal && block_begin + keys - 1 > first_position) ||
               (a.p.window > 0 && block_begin <= last_position - a.p.window);
    }
};

// The keys of the item that a row of its tile sees.
struct Visible {
    int begin, end;
    int first_new;  // key, from which on the mask counts
    uint64_t mask;

    __device__ Visible(const AttentionMmaArgs& a, const Work& work, int row) {
        const int token = token_of_row(a, work.first_row + row), position = work.q_offset + token;
        const bool tree = work.tree();
        end = a.p.causal && !tree ? min(work.end, position + 1) : work.end;
        begin = a.p.window > 0 ? position - a.p.window + 1 : 0;
        first_new = tree ? work.q_offset : work.end;
        mask = tree && row < work.rows ? static_cast<uint64_t>(a.p.tree_mask[work.q_begin + token]) : 0;
    }
    __device__ bool operator()(int key) const {
        return key >= begin && key < end && (key < first_new || (mask >> (key - first_new) & 1) != 0);
    }
};

// Where a row of the tile lies in q, in elements.
__device__ __forceinline__ int64_t row_of_q(const AttentionMmaArgs& a, const Work& work, int kv_head, int row) {
    const int token = token_of_row(a, work.first_row + row), head = work.first_row + row - token * a.group;
    return (work.q_begin + token) * a.p.q_token_stride + (kv_head * a.group + head) * a.p.q_head_stride;
}

template <typename T>
__device__ __forceinline__ T* out_row(const AttentionMmaArgs& a, const Work& work, int kv_head, int row) {
    const int token = token_of_row(a, work.first_row + row), head = work.first_row + row - token * a.group;
    return static_cast<T*>(a.p.out) + (work.q_begin + token) * a.p.out_token_stride +
           (kv_head * a.group + head) * a.p.out_head_stride;
}

template <int D>
__device__ __forceinline__ float* partial_row(const AttentionMmaArgs& a, const WorkItem& item, const Work& work,
                                              int kv_head, int split, int row) {
    const int64_t index = item.partial_row + static_cast<int64_t>(split) * work.all_rows + work.row_offset + row;
    return a.p.workspace + (index * a.p.num_kv_heads + kv_head) * (D + kPartialExtra);
}

template <typename T>
__device__ __forceinline__ void store_four(T* out, float4 x, float scale) {
    Vec<T, 4> y;
    y[0] = from_float<T>(x.x * scale);
    y[1] = from_float<T>(x.y * scale);
    y[2] = from_float<T>(x.z * scale);
    y[3] = from_float<T>(x.w * scale);
    store_vec(out, y);
}

// KV is the dtype of out, unless it is a byte.
template <typename KV>
__device__ __forceinline__ void store_out(const AttentionMmaArgs& a, const Work& work, int kv_head, int row, int column,
                                          float4 x, float scale) {
    if constexpr (!kIsByte<KV>) {
        store_four(out_row<KV>(a, work, kv_head, row) + column, x, scale);
    } else if (a.p.dtype == DType::bf16) {
        store_four(out_row<bf16>(a, work, kv_head, row) + column, x, scale);
    } else {
        store_four(out_row<fp16>(a, work, kv_head, row) + column, x, scale);
    }
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float scale) {
    sum.x += x.x * scale;
    sum.y += x.y * scale;
    sum.z += x.z * scale;
    sum.w += x.w * scale;
}

// -inf (no key seen yet) becomes 0, so that exp2(x - max) is 0 and not NaN.
__device__ __forceinline__ float finite_max(float m) {
    return m == kNegInf ? 0.0f : m;
}

// Called by every item of a split tile once its partial rows are written; the last to come adds up all of them, in the
// order of the splits. weights: rows * splits floats of shared memory.
template <typename KV, int D, int kThreads>
__device__ void combine_if_last(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head,
                                float* weights) {
    constexpr int kColumns = D / 4, kAhead = 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = item.num_splits;
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        // Wraps to 0 at the last, ready for the next launch. The map is const to its readers but for these counters.
        // Releases also what the other threads wrote before the barrier.
        int32_t* counters = const_cast<int32_t*>(a.p.work_map) + kHeaderInts;
        auto* counter =
            reinterpret_cast<uint32_t*>(counters + static_cast<int64_t>(item.counter) * a.p.num_kv_heads + kv_head);
        last = atomic_inc_acq_rel(counter, splits - 1) == static_cast<uint32_t>(splits - 1);
    }
    if (!__syncthreads_or(last)) {
        return;
    }

    // The first few O are asked for before the weights are known.
    const int64_t split_stride = static_cast<int64_t>(work.rows) * a.p.num_kv_heads * (D + kPartialExtra);
    const int count = work.rows * kColumns;
    float4 ahead[kAhead];
    {
        const int i = min(static_cast<int>(threadIdx.x), count - 1);
        const float* partial = partial_row<D>(a, item, work, kv_head, 0, i / kColumns) + i % kColumns * 4;
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            ahead[s] = __ldcg(reinterpret_cast<const float4*>(partial + min(s, splits - 1) * split_stride));
        }
    }
    for (int row = warp; row < work.rows; row += kThreads / 32) {
        const auto part = [&](int s) {
            return __ldcg(reinterpret_cast<const float2*>(partial_row<D>(a, item, work, kv_head, s, row) + D));
        };
        const float2 first = lane < splits ? part(lane) : make_float2(kNegInf, 0.0f);
        float m = first.x, sum = 0.0f;
        for (int s = lane + 32; s < splits; s += 32) {
            m = fmaxf(m, part(s).x);
        }
        m = finite_max(warp_max(m));
        for (int s = lane; s < splits; s += 32) {
            const float2 x = s == lane ? first : part(s);
            const float weight = exp2_approx(x.x - m);
            weights[row * splits + s] = weight;
            sum += weight * x.y;
        }
        sum = warp_sum(sum);
        const float v_scale = scale_of<KV>(a.p.v_scale, kv_head);
        const float scale = sum > 0.0f ? v_scale / sum : 0.0f;
        for (int s = lane; s < splits; s += 32) {
            weights[row * splits + s] *= scale;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const int row = i / kColumns, column = i % kColumns * 4;
        const float* partial = partial_row<D>(a, item, work, kv_head, 0, row) + column;
        const float* weight = weights + row * splits;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        int s = 0;
        if (i == static_cast<int>(threadIdx.x)) {
#pragma unroll
            for (; s < kAhead; ++s) {
                if (s < splits) {
                    add_scaled(x, ahead[s], weight[s]);
                }
            }
        }
#pragma unroll 16
        for (; s < splits; ++s) {
            add_scaled(x, __ldcg(reinterpret_cast<const float4*>(partial + s * split_stride)), weight[s]);
        }
        store_out<KV>(a, work, kv_head, row, column, x, 1.0f);
    }
}

}  // namespace
}  // namespace fastkernels
