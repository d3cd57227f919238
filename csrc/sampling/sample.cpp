// The next token of every sequence: temperature, top-k, top-p, min-p, then a draw; or the largest logit (greedy).
// The algorithm of sample.cu on one row a task: radix selection on the keys of token_mass.h, no sort, no memory.
#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "sampling/token_mass.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

template <typename T>
struct Row {
    const T* logits;
    int32_t vocab_size;

    float operator[](int32_t id) const {
        return clean_logit(to_float(logits[id]));
    }
};

template <typename T>
float largest(const Row<T>& row) {
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int32_t id = 0; id < row.vocab_size; ++id) {
        const float x = row[id];
        max = x > max ? x : max;
    }
    return max;
}

template <typename T>
uint64_t total_mass(const Row<T>& row, float max, float scale) {
    uint64_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int32_t id = 0; id < row.vocab_size; ++id) {
        total += token_mass(row[id], max, scale);
    }
    return total;
}

// The first id at which the sum of amount(id) over ids in order passes `wanted`. Some id must.
template <typename Amount>
int32_t find_in_order(int32_t vocab_size, uint64_t wanted, Amount amount) {
    uint64_t passed = 0;
    for (int32_t id = 0; id < vocab_size; ++id) {
        passed += amount(id);
        if (passed > wanted) {
            return id;
        }
    }
    return vocab_size - 1;
}

// The smallest cut within `cut` whose amounts, summed from the largest key down, reach need(total of the cut).
// All amounts at one key are equal; they are taken by ascending id.
template <typename T, typename Amount, typename Need>
Cut shrink(const Row<T>& row, Cut cut, Amount amount, Need need) {
    uint32_t prefix = 0, prefix_mask = 0;
    uint64_t rest = 0;
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
        uint64_t bins[kBins] = {};
        uint64_t total = 0;
        for (int32_t id = 0; id < row.vocab_size; ++id) {
            const float x = row[id];
            const uint32_t key = ordered_key(x);
            if ((key & prefix_mask) == prefix && is_kept(cut, key, id)) {
                const uint64_t here = amount(x);
                bins[key >> shift & (kBins - 1)] += here;
                total += here;
            }
        }
        if (prefix_mask == 0) {
            rest = need(total);
        }
        uint32_t bin = kBins - 1;
        for (; bin > 0 && bins[bin] < rest; --bin) {
            rest -= bins[bin];
        }
        prefix |= bin << shift;
        prefix_mask |= static_cast<uint32_t>(kBins - 1) << shift;
        if (rest == bins[bin]) {  // the bin is kept whole
            return prefix > cut.key ? Cut{prefix, row.vocab_size - 1} : cut;
        }
    }
    // Some of the ids at one key: each has the amount `one`, and the first ceil(rest / one) of them stay.
    const uint64_t one = amount(std::bit_cast<float>(prefix ^ (prefix >> 31 != 0 ? 0x80000000u : 0xffffffffu)));
    const int32_t last_id = find_in_order(row.vocab_size, (rest + one - 1) / one - 1, [&](int32_t id) {
        const uint32_t key = ordered_key(row[id]);
        return uint64_t{key == prefix && is_kept(cut, key, id)};
    });
    return {prefix, last_id};
}

template <typename T>
void sample_row(const SampleParams& p, int64_t seq) {
    const Row<T> row{static_cast<const T*>(p.logits) + seq * p.logits_stride, static_cast<int32_t>(p.vocab_size)};
    const float max = largest(row);
    const float temperature = p.temperature[seq];
    const int32_t top_k = p.top_k[seq];
    int32_t chosen = 0;
    if (temperature > 0.0f && top_k != 1 && max > -INFINITY) {
        const float scale = kLog2E / temperature;
        const float top_p = p.top_p[seq];
        const auto mass = [&](float x) { return token_mass(x, max, scale); };
        Cut cut{0, row.vocab_size - 1};
        if (top_k > 0 && top_k < row.vocab_size) {
            cut = shrink(row, cut, [](float) { return uint64_t{1}; }, [&](uint64_t) { return uint64_t(top_k); });
        }
        if (top_p < 1.0f) {
            cut = shrink(row, cut, mass, [&](uint64_t total) { return top_p_mass(top_p, total); });
        }
        cut = cut_min_p(cut, p.min_p[seq], max, temperature, row.vocab_size);
        const auto kept_mass = [&](int32_t id) {
            const float x = row[id];
            return is_kept(cut, ordered_key(x), id) ? mass(x) : uint64_t{0};
        };
        uint64_t total = 0;
#pragma omp simd reduction(+ : total)
        for (int32_t id = 0; id < row.vocab_size; ++id) {
            total += kept_mass(id);
        }
        chosen = find_in_order(row.vocab_size, scale_random(philox_u64(p.seeds[seq], p.steps[seq]), total), kept_mass);
    } else {
        while (row[chosen] < max) {
            ++chosen;
        }
    }
    const float x = row[chosen];
    const double sum = static_cast<double>(total_mass(row, max, kLog2E)) * 0x1p-40;
    p.out_ids[seq] = chosen;
    p.out_logprobs[seq] =
        x > -INFINITY ? static_cast<float>((x == max ? 0.0 : static_cast<double>(x) - max) - std::log(sum)) : -INFINITY;
}

}  // namespace

void sample_cpu(const SampleParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_seqs, 1 + 4096 / (p.vocab_size + 1), [&](int64_t seq) { sample_row<T>(p, seq); });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(sample_cpu, SampleParams)
