// out = softmax(scale * q k^T + mask) v with plain FMA: fp32, and what the tensor-core kernel does not take (other
// head sizes up to 256, unaligned strides, a scale that is not positive).
//
//   q, out [num_tokens, num_q_heads, head_dim]   k, v [num_keys, num_kv_heads, head_dim] or the pages of the KV cache
//
// A block owns one token and query head; its 4 warps take the keys in turn, kKeys at once; lane l owns elements
// l + 32 i of q and O. Online softmax a warp, merged through shared memory in the order of the warps. A row's result
// depends on its own sequence alone, whatever else is in the batch and however its prompt was cut into chunks.
// Bytes: 2 * head_dim * sizeof(T) a key and query head. Source: Dao et al. 2022.
#include "attention/attention_mma.h"
#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"

namespace fastkernels {
namespace {

constexpr int kWarps = 4;
constexpr int kKeys = 4;
constexpr int kMaxHeadDim = 256;

// The last sequence that begins at or before token.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens, int num_seqs, int token) {
    int low = 0, high = num_seqs - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cu_seqlens[middle] <= token) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// kPieces: elements a lane owns, head_dim <= 32 * kPieces
template <typename T, int kPieces>
__global__ void __launch_bounds__(kWarps * 32) attention_plain_kernel(const __grid_constant__ AttentionMmaArgs a) {
    __shared__ float merge_o[kWarps][kMaxHeadDim];
    __shared__ float merge_max[kWarps], merge_sum[kWarps];
    const AttentionParams& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = static_cast<int>(blockIdx.x / p.num_q_heads), head = static_cast<int>(blockIdx.x % p.num_q_heads);
    pdl_wait();
    pdl_launch_dependents();
    if (token >= p.cu_seqlens_q[p.num_seqs]) {
        return;  // padding
    }
    const int seq = find_sequence(p.cu_seqlens_q, static_cast<int>(p.num_seqs), token);
    const int q_begin = p.cu_seqlens_q[seq], len_q = p.cu_seqlens_q[seq + 1] - q_begin;
    const bool paged = p.page_size > 0;
    const int k_begin = paged ? 0 : p.cu_seqlens_k[seq];
    const int len_k = paged ? p.seq_lens[seq] : p.cu_seqlens_k[seq + 1] - k_begin;
    if (paged && len_k <= 0) {
        return;
    }
    const int position = len_k - len_q + token - q_begin;
    const int end = p.causal ? min(len_k, position + 1) : len_k;
    const int begin = p.window > 0 ? max(0, position - p.window + 1) : 0;

    const T* k = static_cast<const T*>(p.k) + head / a.group * p.k_head_stride;
    const T* v = static_cast<const T*>(p.v) + head / a.group * p.v_head_stride;
    const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    float query[kPieces], o[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int d = lane + 32 * i;
        query[i] = d < p.head_dim ? to_float(q[d]) : 0.0f;
    }

    float row_max = -INFINITY, row_sum = 0.0f;
    for (int first = begin + warp * kKeys; first < end; first += kWarps * kKeys) {
        int64_t rows[kKeys];
        float score[kKeys];
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            const int key = min(first + j, end - 1);
            rows[j] = k_begin + key;
            if (paged) {
                const int64_t page =
                    p.page_table[seq * p.page_table_seq_stride + (key >> a.page_shift) * p.page_table_page_stride];
                rows[j] = page * a.page_rows + (key & (p.page_size - 1));
            }
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                const int d = lane + 32 * i;
                dot += d < p.head_dim ? query[i] * to_float(k[rows[j] * p.k_token_stride + d]) : 0.0f;
            }
            score[j] = dot;
        }
        float m = row_max;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            score[j] = warp_sum(score[j]) * p.scale;
            if (p.soft_cap > 0.0f) {
                score[j] = p.soft_cap * tanhf(score[j] / p.soft_cap);
            }
            score[j] = first + j < end ? score[j] : -INFINITY;
            m = fmaxf(m, score[j]);
        }
        const float correction = expf(row_max - m);  // m is finite: key `first` is never masked
        row_max = m;
        row_sum *= correction;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            o[i] *= correction;
        }
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            const float weight = expf(score[j] - m);
            row_sum += weight;
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                const int d = lane + 32 * i;
                if (d < p.head_dim && first + j < end) {
                    o[i] += weight * to_float(v[rows[j] * p.v_token_stride + d]);
                }
            }
        }
    }

    if (lane == 0) {
        merge_max[warp] = row_max;
        merge_sum[warp] = row_sum;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        merge_o[warp][lane + 32 * i] = o[i];
    }
    __syncthreads();
    float m = -INFINITY, sum = 0.0f, weights[kWarps];
    for (int w = 0; w < kWarps; ++w) {
        m = fmaxf(m, merge_max[w]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        weights[w] = merge_max[w] == -INFINITY ? 0.0f : expf(merge_max[w] - m);
        sum += weights[w] * merge_sum[w];
    }
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int d = threadIdx.x; d < p.head_dim; d += kWarps * 32) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            x += weights[w] * merge_o[w][d];
        }
        out[d] = from_float<T>(sum > 0.0f ? x / sum : 0.0f);
    }
}

}  // namespace

void attention_plain_cuda(const AttentionMmaArgs& a, void* stream) {
    const AttentionParams& p = a.p;
    check(p.head_dim <= kMaxHeadDim, "attention takes a head_dim of up to ", kMaxHeadDim, ", got ", p.head_dim);
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kPieces>() {
            launch(attention_plain_kernel<T, kPieces>,
                   {.grid = dim3(static_cast<unsigned>(p.num_tokens * p.num_q_heads)),
                    .block = dim3(kWarps * 32),
                    .pdl = true},
                   stream, a);
        };
        if (p.head_dim <= 64) {
            run.template operator()<2>();
        } else if (p.head_dim <= 128) {
            run.template operator()<4>();
        } else {
            run.template operator()<8>();
        }
    });
}

}  // namespace fastkernels
