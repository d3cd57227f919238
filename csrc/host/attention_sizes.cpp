// Sizes of attention's work map and workspace, from shapes alone. Host only: a build without CUDA has them too.
#include <algorithm>

#include "common/check.h"
#include "fastkernels/attention.h"
#include "host/attention_work_map.h"

namespace fastkernels {

AttentionSizes attention_sizes(int64_t num_tokens, int64_t num_seqs, int32_t num_q_heads, int32_t num_kv_heads,
                               int32_t head_dim, int32_t num_sms) {
    check(num_tokens >= 0 && num_seqs >= 0, "num_tokens and num_seqs must not be negative, got ", num_tokens, " and ",
          num_seqs);
    check(num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
          "num_q_heads must be a multiple of num_kv_heads, got ", num_q_heads, " and ", num_kv_heads);
    check(head_dim > 0 && num_sms > 0, "head_dim and num_sms must be positive, got ", head_dim, " and ", num_sms);
    const int32_t group = num_q_heads / num_kv_heads;
    const int64_t first_prefill_row = first_prefill_partial_row(num_tokens, group, head_dim, num_kv_heads, num_sms);
    const int most_rows = std::max(prefill_rows(head_dim), prefill_rows_sm90(head_dim, 1));
    const int64_t rows =
        first_prefill_row + max_split_rows(num_tokens, group, most_rows, target_items(num_kv_heads, num_sms));
    const int64_t prefill_items = max_prefill_items(num_tokens, num_seqs, group, num_kv_heads, num_sms);
    return {.work_map_ints =
                work_map_prefill_item_offset(num_tokens, num_seqs, num_kv_heads, num_sms) + prefill_items * kItemInts,
            .workspace_floats = rows * num_kv_heads * (head_dim + kPartialExtra)};
}

}  // namespace fastkernels
