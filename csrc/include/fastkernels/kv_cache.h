// The paged KV cache of a layer: [num_pages, 2, num_kv_heads, page_size, head_dim], 0 is K, 1 is V, contiguous, so
// that one page of one head is contiguous. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// A slot is page * page_size + offset. A negative one, or one past the cache, is written nothing.
struct AppendKvParams {
    const void* k;                // [num_tokens, num_kv_heads, head_dim], last dimension contiguous
    const void* v;                // like k
    void* kv_cache;               // [num_pages, 2, num_kv_heads, page_size, head_dim]
    const int64_t* slot_mapping;  // [num_tokens]
    int64_t num_tokens, num_pages;
    int64_t k_token_stride, k_head_stride;  // elements
    int64_t v_token_stride, v_head_stride;
    // Of a cache of one-byte elements: what is written is k / k_scale[head], to nearest and saturated; null is 1.
    const float* k_scale;  // [num_kv_heads]
    const float* v_scale;
    int32_t num_kv_heads, head_dim, page_size;
    DType dtype;     // of k and v
    DType kv_dtype;  // of kv_cache: dtype, e4m3, e5m2 or i8
};

// Where the head_dim elements of a slot begin, in elements; kv is 0 for K, 1 for V.
constexpr int64_t kv_cache_offset(int64_t slot, int kv, int64_t head, int64_t num_kv_heads, int64_t page_size,
                                  int64_t head_dim) {
    const int64_t page = slot / page_size, offset = slot - page * page_size;
    return (((page * 2 + kv) * num_kv_heads + head) * page_size + offset) * head_dim;
}

void append_kv_cuda(const AppendKvParams& p, void* stream);
void append_kv_cpu(const AppendKvParams& p);

inline constexpr int kCopyPagesMaxLayers = 128;  // of a launch

// to[layer][to_pages[i]] = from[layer][from_pages[i]], all bytes of a page, for every layer and i. A pair with a page
// that does not exist is skipped; no page may be written twice, or be read and written.
struct CopyPagesParams {
    const void* from[kCopyPagesMaxLayers];  // [num_layers], each [num_from_pages, page_bytes]; or pinned host memory
    void* to[kCopyPagesMaxLayers];          // [num_layers], each [num_to_pages, page_bytes]; or pinned host memory
    const int32_t* from_pages;              // [num_pairs]
    const int32_t* to_pages;                // [num_pairs]
    int64_t num_pairs, num_from_pages, num_to_pages, page_bytes;
    int32_t num_layers;
    bool has_host;  // whether from or to is host memory, beyond a bus
};

void copy_pages_cuda(const CopyPagesParams& p, void* stream);
void copy_pages_cpu(const CopyPagesParams& p);

}  // namespace fastkernels
