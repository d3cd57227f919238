// Which kernel multiplies how many tokens, below those that weight_only_sm90.cuh has.
#pragma once

#include <type_traits>

#include "gemm/weight_only.cuh"
#include "gemm/weight_only_digits.cuh"
#include "gemm/weight_only_few.cuh"

namespace fastkernels {
namespace {

constexpr int kDigitTokens = 4, kFewTokens = 8;

// Blocks that share K, of up to 8 tokens: 2 where there are tiles for half of the SMs only, or where the digits of x
// would cost a block more than a cluster's sums (of int4; by timings on an H200).
inline int choose_few_splits(const WeightOnlyParams& p, const Room& room, bool digits) {
    if (room.capability < 90 || p.tactic > 0) {
        return room.capability < 90 ? 1 : p.tactic;
    }
    const int64_t tiles = (p.out_size + kUnitRows - 1) / kUnitRows, chunks = (p.in_size + kUnitSize - 1) / kUnitSize;
    return tiles * 2 <= room.num_sms || (digits && p.num_tokens * chunks >= 96) ? 2 : 1;
}

// Digit: the format of weight_only_digits.cuh, or void where it has none.
template <typename T, typename F, typename Digit>
void run_weight_only(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    constexpr bool kHasDigits = !std::is_void_v<Digit>;
    const Room room = room_of_device();
    if (p.num_tokens > kFewTokens) {
        return run_weight_only_more<T, F>(p, room, stream);
    }
    const bool digits = kHasDigits && p.num_tokens <= kDigitTokens;
    const int splits = choose_few_splits(p, room, digits && F::kIsInt4);
    if constexpr (kHasDigits) {
        if (digits) {
            return launch_few<Digits<T, Digit>>(p, sides, splits, room, stream);
        }
    }
    launch_few<std::conditional_t<kTakesE4m3<F>, PairsOfBytes<T, F>, Pairs<T, F>>>(p, sides, splits, room, stream);
}

template <typename F, typename Digit = void>
void run_weight_only(const WeightOnlyParams& p, const TokenSides& sides, void* stream) {
    switch (p.dtype) {
        case DType::bf16: return run_weight_only<bf16, F, Digit>(p, sides, stream);
        case DType::f16: return run_weight_only<fp16, F, Digit>(p, sides, stream);
        default: fail("weight_only_linear: dtype ", name(p.dtype), " is not supported: bf16 and fp16 are");
    }
}

}  // namespace
}  // namespace fastkernels
