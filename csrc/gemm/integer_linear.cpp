// out = x W^T + bias with weights of 8 or 4 bits, as sums of products of bytes: W = scale * q with whole q, x as digits
// (digits.h), so that within the elements that share both scales all sums are exact. With int4, x may be rounded to
// e4m3 before.
//
// A task owns kTaskRows rows of the weight. A tile of it, kRows rows x kTokens tokens, keeps its float sums in
// registers and goes along K by units of 2 registers' bytes: weights are unpacked once a tile, digits read once for
// kRows rows. One token is a stream over the weight: bytes moved out_size * in_size, or half of it, and the scales.
// 64 tokens' digits stay in the second-level cache while the task's rows pass over them.
#include <algorithm>
#include <bit>
#include <vector>

#include "common/cpu/parallel.h"
#include "fastkernels/gemm.h"
#include "gemm/digits.h"
#include "gemm/rounded_x.h"
#include "gemm/weight_scales.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr int kMaxRows = kInterleavedRows;
constexpr int64_t kTaskRows = 32, kTokenTile = 64;
constexpr int64_t kPrefetchBytes = 4096;  // in the order of interleaved rows

// Twice the values of e2m1, and 12.
constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// What a weight is given too much by unpack.
constexpr int zero_of(WeightType type) {
    return type == WeightType::int4 ? 8 : type == WeightType::e2m1 ? 12 : kSignedBytes ? 0 : 128;
}

struct Unit {
    Bytes first, second;
};

// first, second: a register each; 4 bits need the first alone
template <WeightType kType>
inline Unit unpack(const uint8_t* first, const uint8_t* second) {
    Unit w;
    if constexpr (kType == WeightType::int8) {
        w = {load_bytes(first), load_bytes(second)};
        if constexpr (!kSignedBytes) {
            w = {w.first ^ 0x80, w.second ^ 0x80};
        }
    } else {
        const Bytes packed = load_bytes(first);
        w = {packed & 0x0f, packed >> 4};
        if constexpr (kType == WeightType::e2m1) {
            w = {look_up(kE2m1, w.first), look_up(kE2m1, w.second)};
        }
    }
    return w;
}

template <WeightType kType>
inline Ints dot_unit(Ints sum, const Unit& w, const int8_t* digits) {
    if constexpr (kType == WeightType::int8 && kSignedBytes) {
        return dot_signed(dot_signed(sum, w.first, load_bytes(digits)), w.second, load_bytes(digits + kBytes));
    } else {
        return dot(dot(sum, w.first, load_bytes(digits)), w.second, load_bytes(digits + kBytes));
    }
}

template <WeightType kType>
constexpr int64_t unit_bytes = kType == WeightType::int8 ? kUnit : kBytes;

// Some rows of the weight and their scales, ready for any token. Rows may take turns by 64 bytes (interleave_rows), so
// that a tile of 8 reads memory in order.
struct Rows {
    const uint8_t* weight;
    int64_t row_stride, chunk_stride;  // of rows, and of 64 bytes of a row
    int64_t prefetch_distance;
    const uint8_t* tail[kMaxRows];  // the last unit where it is not whole, zeros behind
    const float* scales;            // of unit u of row r from r * row_scales + u * unit_scales on
    int64_t row_scales, unit_scales;
    Ints spread;          // lane -> which of its unit's scales
    const float* shifts;  // [kRows][num_sums], scale * (8 - zero), or null
    const int32_t* sums;  // of the weights of a row, where tokens have zero points, or null

    // Where byte `at` of a row lies, from the row's first.
    int64_t offset(int64_t at) const {
        return at / kInterleavedBytes * chunk_stride + at % kInterleavedBytes;
    }
};

// y[t][r] = x token t . row r
template <WeightType kType, int kDigits, int kRows, int kTokens>
inline void multiply(const Rows& rows, const Digits& x, int64_t token, int64_t whole_units,
                     float (&y)[kTokens][kMaxRows]) {
    constexpr bool kOffset = zero_of(kType) != 0;
    constexpr int kOffsets = num_offsets<kDigits>;
    const int8_t* digits[kTokens];
    const int32_t* offsets[kTokens];
    const float* x_scales[kTokens];
    for (int t = 0; t < kTokens; ++t) {
        digits[t] = x.bytes.data() + (token + t) * x.num_units * kDigits * kUnit;
        offsets[t] = x.offsets.data() + (token + t) * x.num_units * kOffsets * kWidth;
        x_scales[t] = x.scales.data() + (token + t) * x.num_units;
    }
    Vec sums[kTokens][kRows] = {};
    Ints totals[kTokens][kRows] = {};  // kDigits = 1: one scale a token and a row, so all is added up exactly
    const auto add_unit = [&](int64_t u, const auto& unit_of) {
        Unit w[kRows];
        Vec scale[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            w[r] = unit_of(r);
            if constexpr (kDigits > 1) {
                scale[r] =
                    __builtin_shuffle(load(rows.scales + r * rows.row_scales + u * rows.unit_scales), rows.spread);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            const int8_t* d = digits[t] + u * kDigits * kUnit;
            const int32_t* o = offsets[t] + u * kOffsets * kWidth;
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                if constexpr (kDigits == 1) {
                    totals[t][r] = dot_unit<kType>(totals[t][r], w[r], d);
                } else {
                    Vec part = to_vec(dot_unit<kType>(Ints{}, w[r], d));
#pragma GCC unroll 2
                    for (int i = 1; i < kDigits; ++i) {
                        const Ints begin = kOffset ? load(o + (i - 1) * kWidth) : Ints{};
                        part = part * kBase + to_vec(dot_unit<kType>(begin, w[r], d + i * kUnit));
                    }
                    sums[t][r] += part * (scale[r] * x_scales[t][u]);
                }
            }
        }
    };
    for (int64_t u = 0; u < whole_units; ++u) {
        const int64_t first = rows.offset(u * unit_bytes<kType>);
        const int64_t second = rows.offset(u * unit_bytes<kType> + kBytes);  // of 8 bits
        add_unit(u, [&](int r) {
            const uint8_t* weight = rows.weight + r * rows.row_stride;
            if constexpr (kTokens == 1) {
                __builtin_prefetch(weight + first + rows.prefetch_distance);
                if constexpr (kType == WeightType::int8) {
                    __builtin_prefetch(weight + second + rows.prefetch_distance);
                }
            }
            return unpack<kType>(weight + first, weight + second);
        });
    }
    if (whole_units < x.num_units) {
        add_unit(whole_units, [&](int r) { return unpack<kType>(rows.tail[r], rows.tail[r] + kBytes); });
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kRows; ++r) {
            if constexpr (kDigits == 1) {
                uint32_t total = sum(std::bit_cast<Words>(totals[t][r])) + x.token_offsets[token + t];
                if (rows.sums != nullptr) {
                    total -= static_cast<uint32_t>(x.zeros[token + t]) * static_cast<uint32_t>(rows.sums[r]);
                }
                y[t][r] = static_cast<float>(static_cast<int32_t>(total)) *
                          (rows.scales[r * rows.row_scales] * x_scales[t][0]);
            } else {
                y[t][r] = sum(sums[t][r]);
            }
            if (rows.shifts != nullptr) {
                const float* x_sums = x.sums.data() + (token + t) * x.num_sums;
                float shift = 0.0f;
#pragma omp simd reduction(+ : shift)
                for (int64_t i = 0; i < x.num_sums; ++i) {
                    shift += rows.shifts[r * x.num_sums + i] * x_sums[i];
                }
                y[t][r] += shift;
            }
        }
    }
}

// What a thread needs beside the operands.
struct Workspace {
    std::vector<float> scales, shifts, groups;
    std::vector<uint8_t> tails;
};

template <WeightType kType>
struct Shape {
    explicit Shape(const QuantizedLinearParams& p)
        : row_bytes(kType == WeightType::int8 ? p.in_size : p.in_size / 2),
          num_units((p.in_size + kUnit - 1) / kUnit),
          whole_units(p.in_size / kUnit),
          num_groups((p.in_size + p.block_size - 1) / p.block_size),
          units_per_group(num_groups == 1 ? num_units : std::max<int64_t>(1, p.block_size / kUnit)) {
        const int64_t scales_per_unit = num_groups == 1 ? 1 : std::max<int64_t>(1, kUnit / p.block_size);
        for (int lane = 0; lane < kWidth; ++lane) {
            spread[lane] = static_cast<int32_t>(lane * scales_per_unit / kWidth);
        }
        unit_scales = num_groups == 1 ? 0 : scales_per_unit;
    }
    int64_t row_bytes, num_units, whole_units, num_groups, units_per_group, unit_scales;
    Ints spread;
};

// The scales of `count` rows as floats, one or more a unit where a row has more than one; room behind them, since a
// register reads past the last.
template <WeightType kType>
void read_scales(const QuantizedLinearParams& p, const Shape<kType>& shape, int64_t row, int count, Workspace& space,
                 Rows& rows) {
    const float factor = kType == WeightType::e2m1 ? 0.5f : 1.0f;
    const bool repeated = shape.num_groups > 1 && shape.units_per_group > 1;
    rows.row_scales = repeated ? shape.num_units : shape.num_groups;
    const int64_t num_groups = count * shape.num_groups, num_scales = count * rows.row_scales;
    space.scales.resize(num_scales + kWidth);
    std::fill_n(space.scales.data() + num_scales, kWidth, 0.0f);
    rows.scales = space.scales.data();
    rows.unit_scales = shape.unit_scales;
    rows.spread = shape.spread;
    if (!repeated) {
        load_scales(p, row * shape.num_groups, num_groups, factor, space.scales.data());
    } else {
        space.groups.resize(num_groups);
        load_scales(p, row * shape.num_groups, num_groups, factor, space.groups.data());
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t u = 0; u < shape.num_units; ++u) {
                space.scales[r * shape.num_units + u] = space.groups[r * shape.num_groups + u / shape.units_per_group];
            }
        }
    }
    rows.shifts = nullptr;
    if (p.zeros != nullptr) {
        space.shifts.resize(num_groups);
        load_scales(p, row * shape.num_groups, num_groups, 1.0f, space.shifts.data());
        for (int64_t i = 0; i < num_groups; ++i) {
            space.shifts[i] *= static_cast<float>(8 - p.zeros[row * shape.num_groups + i]);
        }
        rows.shifts = space.shifts.data();
    }
}

template <WeightType kType>
void prepare(const QuantizedLinearParams& p, const Shape<kType>& shape, int64_t row, int count, Workspace& space,
             Rows& rows) {
    const int64_t turn = row / kInterleavedRows * kInterleavedRows;
    const bool interleaved = p.interleaved && turn + kInterleavedRows <= p.out_size;
    rows.weight =
        p.weight + (interleaved ? turn * shape.row_bytes + (row - turn) * kInterleavedBytes : row * shape.row_bytes);
    rows.row_stride = interleaved ? kInterleavedBytes : shape.row_bytes;
    rows.chunk_stride = (interleaved ? kInterleavedRows : 1) * kInterleavedBytes;
    rows.sums = p.weight_sums == nullptr ? nullptr : p.weight_sums + row;
    rows.prefetch_distance = interleaved ? kPrefetchBytes : count * shape.row_bytes;
    read_scales(p, shape, row, count, space, rows);
    if (shape.whole_units < shape.num_units) {
        space.tails.assign(count * unit_bytes<kType>, 0);
        const int64_t begin = shape.whole_units * unit_bytes<kType>;
        for (int r = 0; r < count; ++r) {
            uint8_t* tail = space.tails.data() + r * unit_bytes<kType>;
            for (int64_t at = begin; at < shape.row_bytes; ++at) {
                tail[at - begin] = rows.weight[r * rows.row_stride + rows.offset(at)];
            }
            rows.tail[r] = tail;
        }
    }
}

template <WeightType kType, int kDigits, int kRows, int kTokens, typename T>
inline void tile(const QuantizedLinearParams& p, const Rows& rows, const Digits& x, int64_t whole_units, int64_t row,
                 int64_t token) {
    float y[kTokens][kMaxRows];
    multiply<kType, kDigits, kRows, kTokens>(rows, x, token, whole_units, y);
    for (int t = 0; t < kTokens; ++t) {
        T* out = static_cast<T*>(p.out) + (token + t) * p.out_token_stride + row;
        for (int r = 0; r < kRows; ++r) {
            const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[row + r]);
            out[r] = from_float<T>(y[t][r] + bias);
        }
    }
}

// kRows, kTokens: of most tiles; what is left over goes by one.
template <WeightType kType, int kDigits, int kRows, int kTokens, typename T>
void all_rows(const QuantizedLinearParams& p, const Digits& x) {
    const Shape<kType> shape(p);
    const int64_t tasks = (p.out_size + kTaskRows - 1) / kTaskRows;
    // A thread gets at least 262,144 products: waking it costs as much.
    const int64_t products = kTaskRows * p.in_size * p.num_tokens;
    parallel_for(tasks, 1 + 262144 / (products + 1), [&](int64_t task) {
        static thread_local Workspace space;
        Rows rows;
        const int64_t end = std::min(p.out_size, (task + 1) * kTaskRows);
        for (int64_t first = 0; first < p.num_tokens; first += kTokenTile) {
            const int64_t last = std::min(p.num_tokens, first + kTokenTile);
            for (int64_t row = task * kTaskRows; row < end;) {
                const bool whole = row + kRows <= end;
                prepare(p, shape, row, whole ? kRows : 1, space, rows);
                int64_t token = first;
                for (; whole && token + kTokens <= last; token += kTokens) {
                    tile<kType, kDigits, kRows, kTokens, T>(p, rows, x, shape.whole_units, row, token);
                }
                for (; token < last; ++token) {
                    if (whole) {
                        tile<kType, kDigits, kRows, 1, T>(p, rows, x, shape.whole_units, row, token);
                    } else {
                        tile<kType, kDigits, 1, 1, T>(p, rows, x, shape.whole_units, row, token);
                    }
                }
                row += whole ? kRows : 1;
            }
        }
    });
}

// x: p.x, or what it was rounded to
template <WeightType kType, int kDigits, typename T, bool kZeros = false, typename X>
void multiply_all(const QuantizedLinearParams& p, const X* rows, int64_t token_stride) {
    static thread_local Digits digits;  // of the calling thread, which the others read
    Digits& x = digits;
    const int64_t num_sums = p.zeros == nullptr ? 0 : (p.in_size - 1) / p.block_size + 1;
    make_digits<kDigits, kType != WeightType::int8, kZeros>(rows, token_stride, p.num_tokens, p.in_size, zero_of(kType),
                                                            num_sums, p.block_size, x);
    if (p.num_tokens == 1) {
        all_rows<kType, kDigits, kMaxRows, 1, T>(p, x);
    } else {
        all_rows<kType, kDigits, 4, kDigits == 1 ? 4 : 2, T>(p, x);
    }
}

template <WeightType kType, int kDigits, typename T, bool kZeros = false>
void multiply_all(const QuantizedLinearParams& p) {
    multiply_all<kType, kDigits, T, kZeros>(p, static_cast<const T*>(p.x), p.x_token_stride);
}

// x is rounded to e4m3 first.
template <WeightType kType, int kDigits, typename T>
void multiply_rounded(const QuantizedLinearParams& p) {
    static thread_local std::vector<float> x;
    round_x<T>(p, x);
    multiply_all<kType, kDigits, T>(p, x.data(), p.in_size);
}

}  // namespace

void integer_linear_cpu(const QuantizedLinearParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        constexpr int kDigits = sizeof(T) == 4 ? 3 : 2;
        switch (p.weight_type) {
            case WeightType::int8:
                switch (p.activation) {
                    case Activation::int8_token: return multiply_all<WeightType::int8, 1, T>(p);
                    case Activation::int8_zeros: return multiply_all<WeightType::int8, 1, T, true>(p);
                    default: return multiply_all<WeightType::int8, kDigits, T>(p);
                }
            case WeightType::int4:
                switch (p.activation) {
                    case Activation::e4m3_token: return multiply_rounded<WeightType::int4, kDigits, T>(p);
                    default: return multiply_all<WeightType::int4, kDigits, T>(p);
                }
            case WeightType::e2m1: return multiply_all<WeightType::e2m1, kDigits, T>(p);
            default: fail("a weight of this type is not a whole number: int8, int4 and e2m1 are");
        }
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY_VNNI(integer_linear_cpu, QuantizedLinearParams)
