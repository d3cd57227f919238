// out = x W^T + bias with weights of fp8 e4m3: products and sums in fp32. A task owns kRows rows of the weight and
// multiplies them with kTokens tokens a pass; a weight becomes a float, scale and all, once a pass. x is rounded first
// where it is asked for.
#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "fastkernels/gemm.h"
#include "gemm/rounded_x.h"
#include "gemm/weight_scales.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr int kRows = 4, kTokens = 4;

// kWidth weights as floats, 2^-8 of what they are: e4m3 with its exponent in fp16's place. NaN is not kept.
inline Vec load_e4m3(const uint8_t* weight) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
    const __m256i half = _mm256_srai_epi16(_mm256_slli_epi16(bits, 8), 1);  // the sign is there twice
    return std::bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_and_si256(half, _mm256_set1_epi16(-0x4001))));
#elif defined(__AVX2__)
    const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight)));
    const __m128i half = _mm_srai_epi16(_mm_slli_epi16(bits, 8), 1);
    return std::bit_cast<Vec>(_mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(-0x4001))));
#else
    Vec v;
    for (int i = 0; i < kWidth; ++i) {
        v[i] = to_float(e4m3{weight[i]}) * 0x1p-8f;
    }
    return v;
#endif
}

inline bool holds_nan(const uint8_t* weight, int64_t size) {
    uint8_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t k = 0; k < size; ++k) {
        found |= (weight[k] & 0x7f) == 0x7f;
    }
    return found != 0;
}

struct Rows {
    const uint8_t* weight;  // kRows rows at a distance of in_size
    const float* scales;    // [kRows][num_blocks], 2^8 times what they are
    int64_t num_blocks;
    float bad[kRows];  // NaN where the row holds one
};

template <int kNumRows, int kNumTokens, typename T>
inline void multiply(const QuantizedLinearParams& p, const Rows& rows, const float* x, int64_t row, int64_t token) {
    Vec sum[kNumTokens][kNumRows] = {};
    float rest[kNumTokens][kNumRows] = {};
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
        const int64_t end = std::min(p.in_size, (block + 1) * p.block_size);
        int64_t k = block * p.block_size;
        for (; k + kWidth <= end; k += kWidth) {
            Vec w[kNumRows];
#pragma GCC unroll 8
            for (int r = 0; r < kNumRows; ++r) {
                const uint8_t* weight = rows.weight + r * p.in_size + k;
                if constexpr (kNumTokens == 1) {
                    __builtin_prefetch(weight + kNumRows * p.in_size);  // the next rows lie behind these
                }
                w[r] = load_e4m3(weight) * rows.scales[r * rows.num_blocks + block];
            }
#pragma GCC unroll 4
            for (int n = 0; n < kNumTokens; ++n) {
                const Vec v = load(x + (token + n) * p.in_size + k);
#pragma GCC unroll 8
                for (int r = 0; r < kNumRows; ++r) {
                    sum[n][r] += w[r] * v;
                }
            }
        }
        for (; k < end; ++k) {
            for (int r = 0; r < kNumRows; ++r) {
                const float scale = rows.scales[r * rows.num_blocks + block] * 0x1p-8f;
                const float w = to_float(e4m3{rows.weight[r * p.in_size + k]}) * scale;
                for (int n = 0; n < kNumTokens; ++n) {
                    rest[n][r] += w * x[(token + n) * p.in_size + k];
                }
            }
        }
    }
    for (int n = 0; n < kNumTokens; ++n) {
        T* out = static_cast<T*>(p.out) + (token + n) * p.out_token_stride + row;
        for (int r = 0; r < kNumRows; ++r) {
            float y = rest[n][r] + rows.bad[r];
            for (int i = 0; i < kWidth; ++i) {
                y += sum[n][r][i];
            }
            out[r] = from_float<T>(y + (p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[row + r])));
        }
    }
}

template <int kNumRows, typename T>
void all_tokens(const QuantizedLinearParams& p, const float* x, int64_t row) {
    static thread_local std::vector<float> scales;
    Rows rows;
    rows.num_blocks = (p.in_size + p.block_size - 1) / p.block_size;
    rows.weight = p.weight + row * p.in_size;
    scales.resize(kNumRows * rows.num_blocks);
    for (int r = 0; r < kNumRows; ++r) {
        const int64_t first = (row + r) / p.block_rows * rows.num_blocks;
        load_scales(p, first, rows.num_blocks, 256.0f, scales.data() + r * rows.num_blocks);
        const bool bad = holds_nan(rows.weight + r * p.in_size, p.in_size);
        rows.bad[r] = bad ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    }
    rows.scales = scales.data();
    int64_t token = 0;
    for (; token + kTokens <= p.num_tokens; token += kTokens) {
        multiply<kNumRows, kTokens, T>(p, rows, x, row, token);
    }
    for (; token < p.num_tokens; ++token) {
        multiply<kNumRows, 1, T>(p, rows, x, row, token);
    }
}

template <typename T>
void all_rows(const QuantizedLinearParams& p) {
    static thread_local std::vector<float> activations;  // of the calling thread, which the others read
    std::vector<float>& x = activations;
    round_x<T>(p, x);
    const int64_t tasks = (p.out_size + kRows - 1) / kRows;
    // A thread gets at least 131,072 products: waking it costs as much.
    const int64_t products = kRows * p.in_size * p.num_tokens;
    parallel_for(tasks, 1 + 131072 / (products + 1), [&](int64_t task) {
        const int64_t row = task * kRows, end = std::min(p.out_size, row + kRows);
        if (end - row == kRows) {
            all_tokens<kRows, T>(p, x.data(), row);
        } else {
            for (int64_t r = row; r < end; ++r) {
                all_tokens<1, T>(p, x.data(), r);
            }
        }
    });
}

}  // namespace

void fp8_linear_cpu(const QuantizedLinearParams& p) {
    visit_float(p.dtype, [&]<typename T>() { all_rows<T>(p); });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(fp8_linear_cpu, QuantizedLinearParams)
