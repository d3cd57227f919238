// Attention over contiguous sequences of variable length or over the pages of a KV cache, any mix of prefill chunks
// and decodes in one call. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

struct AttentionParams {
    const void* q;  // [num_tokens, num_q_heads, head_dim], last dimension contiguous
    // Contiguous: [num_keys, num_kv_heads, head_dim]. Paged: k is the cache
    // [num_pages, 2, num_kv_heads, page_size, head_dim] (0 is K, 1 is V) and v is null.
    const void* k;
    const void* v;
    void* out;  // [num_tokens, num_q_heads, head_dim]

    const int32_t* cu_seqlens_q;  // [num_seqs + 1]; rows past the last entry are padding, their out stays as it is
    const int32_t* cu_seqlens_k;  // [num_seqs + 1]; contiguous only
    const int32_t* seq_lens;      // [num_seqs], keys of a sequence, counting this step's tokens; paged only
    const int32_t* page_table;    // [num_seqs, max_pages], any strides; paged only
    int64_t page_table_seq_stride, page_table_page_stride;

    // GPU only: what attention_plan_cuda made for this step, and room for the partial results of split contexts.
    const int32_t* work_map;  // [attention_sizes().work_map_ints]
    float* workspace;         // [attention_sizes().workspace_floats]

    // Of one-byte elements: what those of a KV head's queries, keys or values are multiplied by; null is 1.
    const float* q_scale;  // [num_kv_heads]
    const float* k_scale;
    const float* v_scale;

    // Of the new tokens of a sequence, those that a token sees: token i sees token j where bit j of its mask is set.
    // For sequences of up to 64 new tokens; longer ones are causal. Null: all are. Paged and without a window only.
    const int64_t* tree_mask;  // [num_tokens]

    int64_t num_tokens, num_seqs;
    int64_t max_query_len;                  // no sequence has more tokens of this step, says the caller; 0: unknown
    int64_t num_keys;                       // rows of k and v; paged: pages of the cache
    int64_t max_pages;                      // of a row of the page table
    int64_t q_token_stride, q_head_stride;  // elements
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t out_token_stride, out_head_stride;
    int32_t num_q_heads, num_kv_heads, head_dim;
    int32_t page_size;  // a power of two; 0 when contiguous
    float scale;        // of q k^T
    float soft_cap;     // scores become soft_cap * tanh(scores / soft_cap); 0 is off
    int32_t window;     // a query sees itself and the window - 1 keys before it; 0 is off
    bool causal;        // query i of a sequence sees keys up to len_k - len_q + i; paged is always causal
    DType dtype;        // of out
    DType q_dtype;      // dtype, or e4m3, when k and v are e4m3 too
    DType kv_dtype;     // of k and v: dtype, or e4m3, or of a cache also e5m2 or i8
};

// Turns the lengths of a step, on the device, into the work map that the attention of every layer of that step
// shares: which block does which query tile over which part of the keys.
struct AttentionPlanParams {
    const int32_t* cu_seqlens_q;  // [num_seqs + 1]
    const int32_t* cu_seqlens_k;  // [num_seqs + 1], or null: then seq_lens
    const int32_t* seq_lens;      // [num_seqs], or null
    int32_t* work_map;            // [attention_sizes().work_map_ints]
    int64_t num_tokens, num_seqs;
    int32_t num_q_heads, num_kv_heads, head_dim;
    int32_t window;  // of the layers that share the map; the map is right for any window, best balanced for this one
    bool causal;
    DType dtype;
};

// Room that attention over at most num_tokens queries of num_seqs sequences needs: a function of shapes alone, so
// that a CUDA graph captured for a bucket of tokens replays any batch in it.
struct AttentionSizes {
    int64_t work_map_ints;
    int64_t workspace_floats;
};
AttentionSizes attention_sizes(int64_t num_tokens, int64_t num_seqs, int32_t num_q_heads, int32_t num_kv_heads,
                               int32_t head_dim, int32_t num_sms);

void attention_plan_cuda(const AttentionPlanParams& p, void* stream);
void attention_cuda(const AttentionParams& p, void* stream);  // contiguous when page_size is 0
void attention_cpu(const AttentionParams& p);

}  // namespace fastkernels
