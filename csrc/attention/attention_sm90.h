// The prefill kernel of Hopper: which calls it takes, and its launch.
#pragma once

#include "attention/attention_mma.h"

namespace fastkernels {

// Steps of at most this many tokens are left to attention_mma whole: with so little work in prefill tiles a second
// launch would cost more than the faster kernel saves.
constexpr int64_t kSmallStepTokens = 128;

// Whether attention_sm90 runs the prefill tiles of calls of these shapes, on the current device. The plan and the
// attention that uses it ask alike.
inline bool prefill_on_sm90(int64_t, int, int, DType) {
    return false;
}

inline void attention_sm90(const AttentionMmaArgs&, void*) {
}

}  // namespace fastkernels
