// Rotary position embedding, alone and joined with the write to the KV cache. Pointers are the GPU's for *_cuda, the
// CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// The pair of dimensions (a, b) of a head turns by the angle of its token's position:
//   a' = a cos - b sin,  b' = b cos + a sin
// Pair i of rotary_dim / 2 is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) when interleaved; dimensions from rotary_dim
// on are copied. A position outside the table takes its nearest row.
struct RopeParams {
    const void* q;   // [num_tokens, num_q_heads, head_dim], last dimension contiguous, as of every tensor below
    const void* k;   // [num_tokens, num_kv_heads, head_dim]
    const void* v;   // like k; rope_append_kv only
    void* q_out;     // like q; may be q
    void* k_out;     // like k; may be k; rope only
    void* kv_cache;  // [num_pages, 2, num_kv_heads, page_size, head_dim]; rope_append_kv only
    const int64_t* slot_mapping;  // [num_tokens]; rope_append_kv only; slots and scales as in kv_cache.h
    const float* k_scale;         // [num_kv_heads] or null; rope_append_kv only
    const float* v_scale;
    // [num_kv_heads, head_dim] or null, of a cache of bytes: taken off the turned k before it is divided by its scale.
    // What a query is worth to all its keys then changes by one number, which softmax does not see.
    const float* k_offset;
    const void* positions;  // [num_tokens] of position_dtype
    const float* cos_sin;   // [max_position, rotary_dim], cosines in the first half of a row, sines in the second
    int64_t num_tokens, max_position, num_pages;
    int64_t q_token_stride, q_head_stride;  // elements
    int64_t k_token_stride, k_head_stride;
    int64_t v_token_stride, v_head_stride;
    int64_t q_out_token_stride, q_out_head_stride;
    int64_t k_out_token_stride, k_out_head_stride;
    int32_t num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
    bool interleaved;
    DType dtype;           // of q, k, v and their outputs
    DType kv_dtype;        // of kv_cache: dtype, e4m3, e5m2 or i8; rope_append_kv only
    DType position_dtype;  // int32 or int64
};

void rope_cuda(const RopeParams& p, void* stream);
void rope_cpu(const RopeParams& p);

void rope_append_kv_cuda(const RopeParams& p, void* stream);
void rope_append_kv_cpu(const RopeParams& p);

}  // namespace fastkernels
