// Formats that only weight_only_sm90 knows: int4 for x in e4m3, and int4 whose scales are multiplied in before wgmma.
#pragma once

#include "gemm/weight_only_formats.cuh"

namespace fastkernels {
namespace {

// int4 for wgmma of e4m3. The bytes 0 to 16 are, in e4m3, 0 to 16 times 2^-9, so 2 w is the byte of 2^-8 w, and of a
// negative w the code 2 (-w - 1) + 1 is made -2 w, with the sign, by adding 0x81: two masks and a multiply-add for four
// weights.
template <int kGroup>
struct Int4E4m3 {
    static constexpr bool kForE4m3 = true;
    static constexpr int kPieces = 2;
    static constexpr int kScaleBytes = kUnitSize / kGroup * 32;
    static constexpr int kScaleSteps = kGroup / 32;
    static constexpr bool kIsInt4 = true;
    template <typename T>
    static constexpr float kLeftOut = 256.0f;

    FK_HOST_DEVICE static void load_half(Half& x, const char* unit, int half, const InOrder& order) {
        const uint4 piece = word_at<uint4>(unit + half * 512 + order.piece[0]);
        x.words[0] = piece.x;
        x.words[1] = piece.y;
        x.words[2] = piece.z;
        x.words[3] = piece.w;
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_operand(const Half& x, int m, const InOrder&, uint32_t (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = i % 2 == 0 ? x.words[m * 2 + i / 2] : x.words[m * 2 + i / 2] >> 4;
            a[i] = (word & 0x01010101u) * 0x81u + (word & 0x0f0f0f0fu);
        }
    }
    FK_HOST_DEVICE static float2 scale(const char* scales, int group, int g) {
        return __half22float2(word_at<__half2>(scales + group * 32 + g * 4));
    }
};

template <typename F>
FK_HOST_DEVICE InOrder order_of(int lane) {
    if constexpr (kTakesE4m3<F>) {
        return {{lane * 16}, 0, lane / 4};
    } else {
        return in_order(lane, F::kIsInt4);
    }
}

// Int4 with each weight times its group's scale, rounded to x's type, so that all of K is one sum.
template <int kGroup, bool kZeros>
struct Int4Scaled : Int4<kGroup, kZeros> {
    using Exact = Int4<kGroup, kZeros>;
    static constexpr int kScaleSteps = 0;

    FK_HOST_DEVICE static void load_half(Half& x, const char* unit, int half, const InOrder& order) {
        Exact::load_half(x, unit, half, order);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            x.factors[s] = word_at<uint32_t>(unit + 1024 + (half * 2 + s) * 32 / kGroup * 32 + order.g * 4);
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_operand(const Half& x, int m, const InOrder& order, uint32_t (&a)[4]) {
        Exact::template unpack_operand<T>(x, m, order, a);
        const uint32_t both = x.factors[m / 2];  // fp16, of rows g and g + 8
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t twice = pick_bytes(both, 0, i % 2 == 0 ? 0x1010 : 0x3232);
            if constexpr (kIsBf16<T>) {
                const float2 wide = __half22float2(as_pair<fp16>(twice));
                twice = bits_of(__floats2bfloat162_rn(wide.x, wide.y));
            }
            a[i] = multiply_pair<T>(a[i], twice);
        }
    }
};

// What tiles of 256 tokens read a format as, whose sums leave no registers for parts of them; those of e4m3 have parts
// of half of the tokens.
template <typename F>
struct Wide {
    using Format = F;
};
template <int kGroup, bool kZeros>
struct Wide<Int4<kGroup, kZeros>> {
    using Format = Int4Scaled<kGroup, kZeros>;
};
template <typename F>
using WideFormat = typename Wide<F>::Format;

// As has_weight_tile says.
template <typename F>
inline constexpr bool kHasWideTile = F::kPieces == 2 && (!kTakesE4m3<F> || F::kScaleSteps == 4);

}  // namespace
}  // namespace fastkernels
