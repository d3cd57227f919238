// Transcendental functions without branches or calls, so that a loop over them becomes vector code. Included by
// kernel files only: everything is in the namespace of the instruction set that the file is compiled for.
// The polynomials were fitted for this library; the errors named are the largest found over all of the domain.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/cpu/isa.h"

namespace fastkernels::cpu::FK_ISA {

// e^x within 2 units in the last place; 0 below -104, denormals between, inf above 88.73, NaN of NaN.
// x = n ln2 + r with |r| <= ln2/2, and e^r = 1 + r + r^2 q(r).
inline float fast_exp(float x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * kLog2e + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float q = 0.0013926250394433737f;
    q = q * r + 0.00836323294788599f;
    q = q * r + 0.04166655242443085f;
    q = q * r + 0.16666576266288757f;
    q = q * r + 0.5f;
    const float y = q * (r * r) + r + 1.0f;
    // 2^n as two factors, since n reaches from -150 to 128; unsigned, since a NaN leaves any bits in `shifted`.
    const uint32_t k = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
    const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(k) >> 1);
    const float low = std::bit_cast<float>((half + 127u) << 23);
    const float high = std::bit_cast<float>((k - half + 127u) << 23);
    return y * low * high;
}

// The standard normal's cumulative distribution, erfc(-x / sqrt 2) / 2, within 3e-7 and, where it is small, within
// 5e-6 of itself. With z = |x| / sqrt 2 and t = 1 / (1 + 0.35 z), erfc(z) = t p(t) e^(-z^2).
inline float fast_normal_cdf(float x) {
    const float t = 1.0f / (1.0f + 0.247487373f * std::fabs(x));
    float p = 0.0393981970846653f;
    p = p * t - 0.16800151765346527f;
    p = p * t + 0.2110418975353241f;
    p = p * t - 0.07746143639087677f;
    p = p * t + 0.13620363175868988f;
    p = p * t + 0.11597741395235062f;
    p = p * t + 0.1626296490430832f;
    p = p * t + 0.1852770447731018f;
    p = p * t + 0.19746872782707214f;
    p = p * t + 0.19746634364128113f;
    const float tail = 0.5f * t * p * fast_exp(-0.5f * x * x);
    return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace fastkernels::cpu::FK_ISA
