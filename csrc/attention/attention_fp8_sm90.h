// The prefill kernel of Hopper for e4m3 queries, keys and values: which calls it takes, and its launch.
#pragma once

#include "attention/attention_sm90_args.h"

namespace fastkernels {

// Of calls that attention_sm90 is planned for (prefill_on_sm90).
inline bool takes_fp8_sm90(const AttentionParams& p) {
    return p.q_dtype == DType::e4m3 && p.kv_dtype == DType::e4m3 && p.head_dim == 128;
}

void attention_fp8_sm90(const AttentionMmaArgs& a, void* stream);

}  // namespace fastkernels
