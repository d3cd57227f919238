// Philox4x32-10: random numbers as a function of (key, counter), with no state. The CPU and the GPU draw the same.
// Source: Salmon, Moraes, Dror and Shaw 2011.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FK_HOST_DEVICE inline
#endif

namespace fastkernels {

struct Philox4 {
    uint32_t word[4];
};

// `static`: each instruction set's kernels keep a copy of their own (common/cpu/isa.h).
static FK_HOST_DEVICE Philox4 philox(uint64_t key, Philox4 counter) {
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// 64 random bits of the token `step` of the sequence seeded with `seed`.
static FK_HOST_DEVICE uint64_t philox_u64(int64_t seed, int32_t step) {
    const Philox4 r = philox(static_cast<uint64_t>(seed), {{static_cast<uint32_t>(step), 0, 0, 0}});
    return static_cast<uint64_t>(r.word[0]) << 32 | r.word[1];
}

}  // namespace fastkernels
