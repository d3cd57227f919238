// Formats of weight_only.h: how a lane makes operands of a unit, for either kernel, and which of its sums a scale
// multiplies.
//
// mma.sync (weight_only.cuh): a lane's 16 bytes of a piece are its own operands, of neighbours along K that it reads
// from x 16 bytes at a time. wgmma (weight_only_sm90.cuh) has x in shared memory and wants the neighbours in order:
// of k16 step m, lane t has pairs 8 m + t and 8 m + 4 + t. Which is a transposed square of words (of int4, of bytes)
// of the four lanes with the same g, so that a lane reads a word of each. Pieces are stored so that both ways meet no
// bank of shared memory twice (piece_of_lane).
#pragma once

#include "gemm/weight_only.h"
#include "gemm/weight_only_unpack.cuh"

namespace fastkernels {
namespace {

// Where in 512 bytes the 16 of lane 4 g + t are, but of formats for e4m3.
FK_HOST_DEVICE int piece_of_lane(int g, int t) {
    return (g * 4 + (t ^ g / 2)) * 16;
}

// What a lane reads of a unit for wgmma: words of the pieces of lanes 4 g to 4 g + 3.
struct InOrder {
    int piece[4];       // bytes from the unit's begin, with the word's place in the piece
    uint32_t selector;  // of int4: the bytes of two words that are this lane's
    int g;
};

FK_HOST_DEVICE InOrder in_order(int lane, bool is_int4) {
    const int g = lane / 4, t = lane % 4;
    InOrder order{{}, t % 2 == 0 ? 0x6240u : 0x7351u, g};
    for (int j = 0; j < 4; ++j) {
        order.piece[j] = piece_of_lane(g, j) + (is_int4 ? t / 2 * 8 : t * 4);
    }
    return order;
}

// What a lane has read of 64 neighbours of a unit.
struct Half {
    uint32_t words[8], scales[2], factors[2];
};

template <typename Word>
FK_HOST_DEVICE Word word_at(const char* p) {
    return *reinterpret_cast<const Word*>(p);
}

// Each format has
//   kPieces: of 512 bytes, of a unit
//   kScaleSteps: steps of 32 along K that share a scale of fp32 sums; 0: there is none
//   kTokenSteps: steps whose tokens a lane needs together for mma.sync, where it has neighbours of both
//   kLeftOut: a factor of the sums
//   prepare, unpack: for mma.sync, one of the two operands of a step of 32
//   load_half, unpack_operand: for wgmma, what makes the four of 64 neighbours, and one of them
//   scale: of the sums of rows g and g + 8, of a group
// and, where x is e4m3, kForE4m3.
template <typename F>
inline constexpr bool kTakesE4m3 = requires { F::kForE4m3; };

// Where in a piece of 512 bytes a lane's 16 are.
template <typename F>
FK_HOST_DEVICE int own_piece(int lane) {
    return kTakesE4m3<F> ? lane * 16 : piece_of_lane(lane / 4, lane % 4);
}

template <int kGroup, bool kZeros>
struct Int4 {
    static constexpr int kPieces = 2;
    static constexpr int kGroups = kUnitSize / kGroup;
    static constexpr int kScaleBytes = kGroups * (kZeros ? 48 : 32);
    static constexpr int kScaleSteps = kGroup / 32;
    static constexpr int kTokenSteps = 1;
    static constexpr bool kIsInt4 = true;
    template <typename T>
    static constexpr float kLeftOut = 1.0f;

    template <typename T>
    FK_HOST_DEVICE static void prepare(uint32_t (&zero)[2], const char* scales, int step, int g, int t) {
        zero[0] = zero[1] = kEight<T>;
        if constexpr (kZeros) {
            const uint32_t zeros = word_at<uint16_t>(scales + kGroups * 32 + step / kScaleSteps * 16 + g * 2);
            zero[0] = int4_zero<T, 0>(zeros);
            zero[1] = int4_zero<T, 1>(zeros);
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack(const uint4& piece, int step, int j, const uint32_t (&zero)[2],
                                      uint32_t (&a)[4]) {
        const uint32_t first = j == 0 ? piece.x : piece.z, second = j == 0 ? piece.y : piece.w;
        unpack_int4<T>(step % 2 == 0 ? first : second, zero, a);
    }
    FK_HOST_DEVICE static void load_half(Half& x, const char* unit, int half, const InOrder& order) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint2 both = word_at<uint2>(unit + order.piece[j] + half * 512);
            x.words[j * 2] = both.x;
            x.words[j * 2 + 1] = both.y;
        }
        if constexpr (kZeros) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                x.scales[s] =
                    word_at<uint16_t>(unit + 1024 + kGroups * 32 + (half * 2 + s) / kScaleSteps * 16 + order.g * 2);
            }
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_operand(const Half& x, int m, const InOrder& order, uint32_t (&a)[4]) {
        const int s = m / 2, j = m % 2 * 2;
        uint32_t zero[2] = {kEight<T>, kEight<T>};
        if constexpr (kZeros) {
            zero[0] = int4_zero<T, 0>(x.scales[s]);
            zero[1] = int4_zero<T, 1>(x.scales[s]);
        }
        unpack_int4<T>(pick_bytes(x.words[j * 2 + s], x.words[j * 2 + 2 + s], order.selector), zero, a);
    }
    FK_HOST_DEVICE static float2 scale(const char* scales, int group, int g) {
        return __half22float2(word_at<__half2>(scales + group * 32 + g * 4));
    }
};

// int4_e4m3 for mma.sync of fp16, which bytes of x become. A word of a piece is an operand, of pairs k, k + 2 and
// k + 1, k + 3 as to_halves leaves those of x. In fp16 the bits 0 to 16 are 0 to 16 times 2^-24, so 2 w is that of
// 2^-23 w, and of a negative w the code 2 (-w - 1) + 1 is made -2 w, with the sign, by adding 0x8001.
template <int kGroup>
struct Int4OfBytes : Int4<kGroup, false> {
    static constexpr bool kForE4m3 = true;
    template <typename T>
    static constexpr float kLeftOut = 8388608.0f;

    template <typename T>
    FK_HOST_DEVICE static void prepare(uint32_t (&)[2], const char*, int, int, int) {
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack(const uint4& piece, int step, int j, const uint32_t (&)[2], uint32_t (&a)[4]) {
        const uint32_t first = j == 0 ? piece.x : piece.y, second = j == 0 ? piece.z : piece.w;
        const uint32_t word = step % 2 == 0 ? first : second;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] = (word >> 4 * i & 0x00010001u) * 0x8001u + (word >> 4 * i & 0x000f000fu);
        }
    }
};

template <int kBlock>
struct E2m1 {
    static constexpr int kPieces = 2;
    static constexpr int kScaleBytes = kBlock == 16 ? 128 : 64;
    static constexpr int kScaleSteps = 0;
    static constexpr int kTokenSteps = 2;
    static constexpr bool kIsInt4 = false;
    template <typename T>
    static constexpr float kLeftOut = kE2m1LeftOut<T>;

    // A lane's 16 neighbours of 64 have one scale a row.
    template <typename T>
    FK_HOST_DEVICE static void prepare(uint32_t (&scale)[2], const char* scales, int step, int g, int t) {
        const int at = kBlock == 16 ? step / 2 * 64 + g * 8 + t * 2 : step / 2 * 32 + g * 4 + t / 2 * 2;
        const uint32_t codes = word_at<uint16_t>(scales + at);
        scale[0] = e2m1_scale<T, kBlock>(codes, 0);
        scale[1] = e2m1_scale<T, kBlock>(codes, 1);
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack(const uint4& piece, int step, int j, const uint32_t (&scale)[2],
                                      uint32_t (&a)[4]) {
        const uint32_t first = j == 0 ? piece.x : piece.y, second = j == 0 ? piece.z : piece.w;
        unpack_e2m1<T>(step % 2 == 0 ? first : second, scale, a);
    }
    FK_HOST_DEVICE static void load_half(Half& x, const char* unit, int half, const InOrder& order) {
        const char* scales = unit + 1024 + half * (kBlock == 16 ? 64 : 32) + order.g * (kBlock == 16 ? 8 : 4);
        x.scales[0] = word_at<uint32_t>(scales);
        if constexpr (kBlock == 16) {
            x.scales[1] = word_at<uint32_t>(scales + 4);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            x.words[m] = word_at<uint32_t>(unit + order.piece[m] + half * 512);
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_operand(const Half& x, int m, const InOrder&, uint32_t (&a)[4]) {
        const uint32_t codes = x.scales[kBlock == 16 ? m / 2 : 0];
        const int first = kBlock == 16 ? m % 2 * 2 : m / 2 * 2;
        const uint32_t scale[2] = {e2m1_scale<T, kBlock>(codes, first), e2m1_scale<T, kBlock>(codes, first + 1)};
        unpack_e2m1<T>(x.words[m], scale, a);
    }
    FK_HOST_DEVICE static float2 scale(const char*, int, int) {
        return {1.0f, 1.0f};
    }
};

template <bool kIsInt8, bool kByBlock = false>
struct Byte {
    static constexpr int kPieces = 4;
    static constexpr int kScaleBytes = kByBlock ? 16 : 0;
    static constexpr int kScaleSteps = kByBlock ? 4 : 0;
    static constexpr int kTokenSteps = 1;
    static constexpr bool kIsInt4 = false;
    template <typename T>
    static constexpr float kLeftOut = kIsInt8 ? 1.0f : kE4m3LeftOut<T>;

    template <typename T>
    FK_HOST_DEVICE static void prepare(uint32_t (&)[2], const char*, int, int, int) {
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_pairs(uint32_t word, uint32_t& first, uint32_t& second) {
        if constexpr (kIsInt8) {
            unpack_int8<T>(word, first, second);
        } else {
            unpack_e4m3<T>(word, first, second);
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack(const uint4& piece, int, int j, const uint32_t (&)[2], uint32_t (&a)[4]) {
        unpack_pairs<T>(j == 0 ? piece.x : piece.z, a[0], a[1]);
        unpack_pairs<T>(j == 0 ? piece.y : piece.w, a[2], a[3]);
    }
    FK_HOST_DEVICE static void load_half(Half& x, const char* unit, int half, const InOrder& order) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x.words[i] = word_at<uint32_t>(unit + (half * 2 + i / 4) * 512 + order.piece[i % 4]);
        }
    }
    template <typename T>
    FK_HOST_DEVICE static void unpack_operand(const Half& x, int m, const InOrder&, uint32_t (&a)[4]) {
        unpack_pairs<T>(x.words[m * 2], a[0], a[1]);
        unpack_pairs<T>(x.words[m * 2 + 1], a[2], a[3]);
    }
    FK_HOST_DEVICE static float2 scale(const char* scales, int, int) {
        if constexpr (kByBlock) {
            const float one = word_at<float>(scales);
            return {one, one};
        } else {
            return {1.0f, 1.0f};
        }
    }
};

}  // namespace
}  // namespace fastkernels
