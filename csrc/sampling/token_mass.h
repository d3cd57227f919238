// The integers that sampling is done in. With them every sum is exact, whatever its order: results repeat bit for bit,
// and the CPU and the GPU choose the same token.
//
//   key   orders logits: a uint32 that grows with the fp32 value; NaN counts as -inf, -0 as +0
//   mass  2^40 * exp((logit - max) / temperature): proportional to the probability. The largest logit has 2^40; a
//         token less likely than 2^-41 of that has none, and is never drawn. 2^22 tokens sum to 2^62.
//   cut   a set of tokens closed upwards: every key above cut.key, and of that key the ids up to cut.last_id
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "fastkernels/sampling.h"

namespace fastkernels {

static FK_HOST_DEVICE float clean_logit(float x) {
    return x != x ? -INFINITY : x;
}

static FK_HOST_DEVICE uint32_t ordered_key(float x) {  // of a clean logit
    const uint32_t bits = std::bit_cast<uint32_t>(x == 0.0f ? 0.0f : x);
    return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

// scale: log2(e) / temperature, perhaps inf.
static FK_HOST_DEVICE uint64_t token_mass(float x, float max, float scale) {
    // distance: octaves below the largest, in fixed point with 25 bits behind the point.
    const float octaves = x >= max ? 0.0f : (max - x) * scale;
    const bool counts = octaves < 41.0f;  // false for NaN, which is -inf at temperature inf
    const uint32_t distance = static_cast<uint32_t>(static_cast<int32_t>((counts ? octaves : 0.0f) * 0x1p25f));
    const uint32_t whole = (distance + 0x1ffffffu) >> 25;
    const uint32_t z = ((whole << 25) - distance) << 7;  // mass = 2^40 * 2^z * 2^-whole, z in [0, 1) with 32 bits
    // 2^z in units of 2^-31: a polynomial near the minimax one, relative error 3.3e-9.
    const auto next = [z](uint32_t acc, uint32_t coefficient) {
        return coefficient + static_cast<uint32_t>(static_cast<uint64_t>(acc) * z >> 32);
    };
    uint32_t acc = next(0x00072445u, 0x0028ae63u);
    acc = next(acc, 0x013d3b8au);
    acc = next(acc, 0x071a0cd3u);
    acc = next(acc, 0x1ebfda73u);
    acc = next(acc, 0x58b90a80u);
    acc = next(acc, 0x80000000u);
    return counts ? static_cast<uint64_t>(acc) << 9 >> whole : 0;
}

struct Cut {
    uint32_t key;
    int32_t last_id;
};

static FK_HOST_DEVICE bool is_kept(const Cut& cut, uint32_t key, int32_t id) {
    return key > cut.key || (key == cut.key && id <= cut.last_id);
}

// The part of `cut` whose probability is at least min_p times the largest.
static FK_HOST_DEVICE Cut cut_min_p(const Cut& cut, float min_p, float max, float temperature, int64_t vocab_size) {
    if (!(min_p > 0.0f)) {
        return cut;
    }
    const double log_ratio = std::log(static_cast<double>(min_p < 1.0f ? min_p : 1.0f));
    const double lowest = static_cast<double>(max) + static_cast<double>(temperature) * log_ratio;
    const uint32_t key = ordered_key(clean_logit(static_cast<float>(lowest)));
    return key > cut.key ? Cut{key, static_cast<int32_t>(vocab_size - 1)} : cut;
}

// The least mass that top-p keeps: at least 1, so at least one token.
static FK_HOST_DEVICE uint64_t top_p_mass(float top_p, uint64_t total) {
    const double wanted = std::ceil(static_cast<double>(top_p) * static_cast<double>(total));
    const uint64_t need = wanted > 1.0 ? static_cast<uint64_t>(wanted) : 1;
    return need < total ? need : total;
}

// A number below total, evenly spread: random / 2^64 * total.
static FK_HOST_DEVICE uint64_t scale_random(uint64_t random, uint64_t total) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(random) * total >> 64);
}

}  // namespace fastkernels
