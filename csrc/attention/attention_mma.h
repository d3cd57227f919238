// What the launcher of attention hands to its kernels; attention_mma has one instantiation file a head size.
#pragma once

#include <vector_types.h>

#include "fastkernels/attention.h"
#include "host/attention_work_map.h"

namespace fastkernels {

// Pages are brought to the form of contiguous keys: key row r is at k + r * k_token_stride + kv_head * k_head_stride
// and at v alike, where r = page * page_rows + offset in the page.
struct AttentionMmaArgs {
    AttentionParams p;
    int32_t group;        // query heads a KV head
    uint32_t per_group;   // 2^24 / group, rounded up: row / group is row * per_group / 2^24
    int32_t page_shift;   // log2(page_size)
    uint32_t page_rows;   // rows of head_dim elements in a page, K and V of all heads
    float exponent;       // the weight of a score s is 2^(exponent * s); with a soft cap s is the tanh
    float tanh_exponent;  // e^2x = 2^(tanh_exponent * score), x = scale * score / soft_cap
    int64_t item_offset, prefill_item_offset;  // in the work map
    int32_t prefill_rows;                      // of a prefill tile, as the plan cut them
    int32_t num_sms;
    // attention_sm90 was launched just before, for the prefill items of this call, and the two run side by side:
    // attention_decode does not wait for it to end, but ends after it (attention.cu).
    bool beside_prefill;
};

template <typename T, int D>
void attention_mma(const AttentionMmaArgs& a, dim3 grid, void* stream);

// Plain FMA for fp32 and for any head_dim up to 256; ignores the work map.
void attention_plain_cuda(const AttentionMmaArgs& a, void* stream);

}  // namespace fastkernels
