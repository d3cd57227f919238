// Rows picked by index. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// out[i] = rows[indices[i]], zeros where the index is outside [0, num_rows). The ops embedding and gather_rows.
struct GatherRowsParams {
    const void* rows;     // [num_rows, row_size], last dimension contiguous
    const void* indices;  // [num_indices] of index_dtype
    void* out;            // [num_indices, row_size], last dimension contiguous
    int64_t num_rows, num_indices, row_size;
    int64_t row_stride, out_stride;  // elements
    DType dtype;                     // of rows and out
    DType index_dtype;               // int32 or int64
};

// out[i] = token_ids[i], or sampled[-token_ids[i] - 1] where that is negative, or -1 where it points past sampled.
struct ResolveTokenIdsParams {
    const int32_t* token_ids;  // [num_tokens]
    const int32_t* sampled;    // [num_sampled]
    int32_t* out;              // [num_tokens], may be token_ids
    int64_t num_tokens, num_sampled;
};

void gather_rows_cuda(const GatherRowsParams& p, void* stream);
void gather_rows_cpu(const GatherRowsParams& p);

void resolve_token_ids_cuda(const ResolveTokenIdsParams& p, void* stream);
void resolve_token_ids_cpu(const ResolveTokenIdsParams& p);

}  // namespace fastkernels
