// A Product of weight_only_few.cuh for int4 and int8: the tensor cores multiply bytes (mma.sync m16n8k32, int32 sums),
// so that nothing is unpacked, and yet x is not rounded to 8 bits.
//
// x becomes digits: 128 neighbours of a token share a scale, the largest / kDigitsLargest, and each is a whole number
// of 16 bits (1 / 65,200 of the largest), a high and a low byte, both signed. W's rows are A, unsigned for int4, and
// the two digits of a token are neighbouring columns of B, so 4 tokens fill one; 256 high + low is put together in
// fp32, where a lane has both. A zero point is taken off as zero times the sum of x's numbers. The CPU does likewise
// (digits.h).
#pragma once

#include "common/byte_scales.h"
#include "common/ptx/mma_u8.cuh"
#include "common/ptx/rcp.cuh"
#include "gemm/weight_only_formats.cuh"

namespace fastkernels {
namespace {

constexpr float kDigitsLargest = 32600.0f;  // 127.5 * 256, less what rounding could add
// int32 sums begin with the bits of this, 1.5 * 2^23: below 2^22 they stay the bits of it plus the sum.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// --- Formats: how the bytes of A come from a unit --------------------------------------------------------------------
//   kGroups: of a unit, whose sums of x's numbers are needed; kSums: how many of them
//   load: this lane's piece of a step of 32 along K, where that begins one
//   multiply: the sums of a step
//   finish: 256 high + low of rows g and g + 8, of sums that began with kMagicBits; of row g + 8 without kSecond
//   zeros: the zero points of rows g and g + 8

// A byte is a code of row g and, above it, of row g + 8. A is the whole byte and its upper half, so the sums are those
// of row g plus 16 times row g + 8, and of 16 times row g + 8.
template <int kGroup, bool kZeros>
struct DigitInt4 : Int4<kGroup, kZeros> {
    static constexpr int kSums = kUnitSize / kGroup;
    static constexpr float kSecond = 1.0f / 16.0f;

    __device__ __forceinline__ static void load(uint4& piece, const char* unit, int my_piece, int step) {
        if (step % 2 == 0) {
            piece = *reinterpret_cast<const uint4*>(unit + step / 2 * 512 + my_piece);
        }
    }
    __device__ __forceinline__ static void multiply(int32_t (&c)[4], const uint4& piece, int step, uint32_t b0,
                                                    uint32_t b1) {
        const uint32_t first = step % 2 == 0 ? piece.x : piece.y, second = step % 2 == 0 ? piece.z : piece.w;
        const uint32_t a[4] = {first, first & 0xf0f0f0f0u, second, second & 0xf0f0f0f0u};
        mma_m16n8k32_u8_int8(c, a, b0, b1);
    }
    __device__ __forceinline__ static float2 finish(const int32_t (&c)[4]) {
        const float high = __int_as_float(c[2]), low = __int_as_float(c[3]);
        return {fmaf(__int_as_float(c[0]) - high, 256.0f, __int_as_float(c[1]) - low),
                fmaf(high - kMagic, 256.0f, low - kMagic)};
    }
    __device__ __forceinline__ static float2 zeros(const char* scales, int group, int g) {
        if constexpr (kZeros) {  // 2^23 plus the byte is a float's bits
            const uint32_t two = word_at<uint16_t>(scales + kSums * 32 + group * 16 + g * 2);
            return {__uint_as_float(pick_bytes(two, 0x4b000000u, 0x7440)) - 8388608.0f,
                    __uint_as_float(pick_bytes(two, 0x4b000000u, 0x7441)) - 8388608.0f};
        } else {
            return {8.0f, 8.0f};
        }
    }
};

struct DigitInt8 : Byte<true> {
    static constexpr int kGroups = 1;
    static constexpr int kSums = 0;
    static constexpr float kSecond = 1.0f;

    __device__ __forceinline__ static void load(uint4& piece, const char* unit, int my_piece, int step) {
        piece = *reinterpret_cast<const uint4*>(unit + step * 512 + my_piece);
    }
    __device__ __forceinline__ static void multiply(int32_t (&c)[4], const uint4& piece, int, uint32_t b0,
                                                    uint32_t b1) {
        const uint32_t a[4] = {pick_bytes(piece.x, piece.y, 0x6240), pick_bytes(piece.x, piece.y, 0x7351),
                               pick_bytes(piece.z, piece.w, 0x6240), pick_bytes(piece.z, piece.w, 0x7351)};
        mma_m16n8k32_int8(c, a, b0, b1);
    }
    __device__ __forceinline__ static float2 finish(const int32_t (&c)[4]) {
        return {fmaf(__int_as_float(c[0]) - kMagic, 256.0f, __int_as_float(c[1]) - kMagic),
                fmaf(__int_as_float(c[2]) - kMagic, 256.0f, __int_as_float(c[3]) - kMagic)};
    }
};

// Of two pairs of magnitudes, the larger ones; NaN where one is.
template <typename T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t x, uint32_t y) {
    return bits_of(__hmax2_nan(as_pair<T>(x), as_pair<T>(y)));
}

template <typename T>
__device__ __forceinline__ float2 pair_floats(uint32_t pair) {
    if constexpr (kIsBf16<T>) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
        return __half22float2(as_pair<T>(pair));
    }
}

// --- The product -----------------------------------------------------------------------------------------------------

template <typename T, typename F>
struct Digits {
    using Element = T;
    using Format = F;
    static constexpr int kTokens = 4, kLaneTokens = 1, kAhead = 1;
    static constexpr int kGroups = F::kGroups, kSums = F::kSums, kSteps = 4 / kGroups;
    static constexpr float kLeftOut = 1.0f;

    struct Chunk {
        uint4 digits[2];
        float scale, sum;   // sum: where there is one
        const float* sums;  // in the slot, else: registers are few
    };

    // [2 of 64 neighbours][token, digit][4 of t][16 digits], then [token] its scale and the groups' sums
    __host__ __device__ static constexpr int slot_bytes(int num_tokens) {
        return num_tokens * (256 + (1 + kSums) * 4) / 16 * 16 + 16;
    }
    // A lane has 8 neighbours, those that lanes of_t need for step of_step.
    __device__ __forceinline__ static void put(char* slot, const uint4& x, int token, int half_lane, int num_tokens) {
        const int of_step = half_lane / 4, of_t = half_lane % 4;
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        uint32_t most = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            most = larger_pair<T>(most, words[j] & 0x7fff7fffu);
        }
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) {
            most = larger_pair<T>(most, __shfl_xor_sync(~0u, most, lanes));
        }
        const float2 both = pair_floats<T>(larger_pair<T>(most, pick_bytes(most, 0, 0x1032)));
        // Infinity and NaN make all of the token's results NaN.
        const float scale = both.x < __int_as_float(0x7f800000) ? fmaxf(both.x * (1.0f / kDigitsLargest), kLeastScale)
                                                                : __int_as_float(0x7fffffff);
        const float inverse = rcp_approx(scale);
        // Numbers, 32768 + 128 more than they are: of 16 bits without sign, each of whose bytes is 128 more.
        uint32_t numbers[8];
        uint32_t sum = 0u - 8u * (kMagicBits + 32896u);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 pair = pair_floats<T>(words[j]);
            numbers[j * 2] = __float_as_uint(fmaf(pair.x, inverse, kMagic + 32896.0f));
            numbers[j * 2 + 1] = __float_as_uint(fmaf(pair.y, inverse, kMagic + 32896.0f));
            sum += numbers[j * 2] + numbers[j * 2 + 1];
        }
        uint32_t high[2], low[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // k, k + 2, k + 1, k + 3, as the formats' bytes are
            const uint32_t even = pick_bytes(numbers[j * 4], numbers[j * 4 + 2], 0x5410);
            const uint32_t odd = pick_bytes(numbers[j * 4 + 1], numbers[j * 4 + 3], 0x5410);
            low[j] = pick_bytes(even, odd, 0x6420) ^ 0x80808080u;
            high[j] = pick_bytes(even, odd, 0x7531) ^ 0x80808080u;
        }
        if constexpr (kSums > 0) {
#pragma unroll
            for (int lanes = 8 / kGroups; lanes > 0; lanes /= 2) {
                sum += __shfl_xor_sync(~0u, sum, lanes);
            }
        }
        if (token < num_tokens) {
            char* to = slot + of_step / 2 * (num_tokens * 128) + token * 128 + of_t * 16 + of_step % 2 * 8;
            *reinterpret_cast<uint2*>(to) = uint2{high[0], high[1]};
            *reinterpret_cast<uint2*>(to + 64) = uint2{low[0], low[1]};
            float* scale_and_sums = reinterpret_cast<float*>(slot + num_tokens * 256) + token * (1 + kSums);
            if (half_lane == 0) {
                scale_and_sums[0] = scale;
            }
            if (kSums > 0 && half_lane % (16 / kGroups) == 0) {
                scale_and_sums[1 + half_lane / (16 / kGroups)] = static_cast<float>(static_cast<int32_t>(sum));
            }
        }
    }
    // Columns past the last token repeat it and are not written.
    __device__ __forceinline__ static void load(Chunk& chunk, const char* slot, int g, int t, int num_tokens) {
        const int column = min(g, num_tokens * 2 - 1) * 64 + t * 16;
        chunk.digits[0] = *reinterpret_cast<const uint4*>(slot + column);
        chunk.digits[1] = *reinterpret_cast<const uint4*>(slot + num_tokens * 128 + column);
        const float* scale_and_sums =
            reinterpret_cast<const float*>(slot + num_tokens * 256) + min(t, num_tokens - 1) * (1 + kSums);
        chunk.scale = scale_and_sums[0];
        chunk.sums = scale_and_sums + 1;
        if constexpr (kSums == 1) {
            chunk.sum = *chunk.sums;
        }
    }
    __device__ __forceinline__ static void multiply(float2 (&sum)[1], const Chunk& chunk, const char* unit,
                                                    int my_piece, int g, int) {
        const char* scales = unit + F::kPieces * 512;
        int32_t c[4];
        uint4 piece;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (step % kSteps == 0) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[e] = kMagicBits;
                }
            }
            F::load(piece, unit, my_piece, step);
            const uint4& digits = chunk.digits[step / 2];
            F::multiply(c, piece, step, step % 2 == 0 ? digits.x : digits.z, step % 2 == 0 ? digits.y : digits.w);
            if ((step + 1) % kSteps == 0) {
                const int group = step / kSteps;
                float2 y = F::finish(c);
                if constexpr (kSums > 0) {
                    const float x_sum = kSums == 1 ? chunk.sum : chunk.sums[group];
                    const float2 zero = F::zeros(scales, group, g);
                    y.x = fmaf(-zero.x, x_sum, y.x);
                    y.y = fmaf(-zero.y / F::kSecond, x_sum, y.y);
                }
                const float2 scale = F::scale(scales, group, g);
                sum[0].x = fmaf(y.x, scale.x * chunk.scale, sum[0].x);
                sum[0].y = fmaf(y.y, scale.y * (chunk.scale * F::kSecond), sum[0].y);
            }
        }
    }
};

}  // namespace
}  // namespace fastkernels
