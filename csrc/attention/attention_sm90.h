// The prefill kernel of Hopper: which calls it takes, its shapes, and its launch.
#pragma once

#include "attention/attention_mma.h"

namespace fastkernels {

// Steps of at most this many tokens are left to attention_mma whole: with so little work in prefill tiles a second
// launch would cost more than the faster kernel saves.
constexpr int64_t kSmallStepTokens = 128;

// Whether attention_sm90 runs the prefill tiles of calls of these shapes, on the current device. The plan and the
// attention that uses it ask alike.
bool prefill_on_sm90(int64_t num_tokens, int head_dim, int group, DType dtype);

void attention_sm90(const AttentionMmaArgs& a, void* stream);

}  // namespace fastkernels
