// Queries of bf16 where keys of one byte are multiplied as fp16.
#pragma once

#include "common/ptx/mma.cuh"

namespace fastkernels {
namespace {

// Two neighbouring elements of bf16 as fp16; what fp16 cannot hold becomes the largest it can.
__device__ __forceinline__ uint32_t as_fp16(uint32_t pair) {
    constexpr float kLargest = 65504.0f;
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
    return pack_pair<fp16>(fminf(fmaxf(low, -kLargest), kLargest), fminf(fmaxf(high, -kLargest), kLargest));
}

}  // namespace
}  // namespace fastkernels
