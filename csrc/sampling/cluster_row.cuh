// What the cluster sampling kernel is made of: its shared memory, the row in it, sums over a row's blocks.
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/ex2.cuh"
#include "common/reduce.cuh"
#include "sampling/token_mass.h"

namespace fastkernels::sampling {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkVecs = 4;
constexpr int kMaxChunks = 80;    // of a block: 160 KB
constexpr int kRoomyChunks = 32;  // of a block: two blocks an SM
constexpr int kBins = 2048;
constexpr int kListMax = kThreads;       // a thread a token
constexpr float kBinsPerOctave = 49.0f;  // 41 octaves have mass
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

template <typename T>
constexpr int kChunk = 32 * kVecElements<T> * kChunkVecs;

struct alignas(16) Shared {
    uint32_t low[kBins],
        high[kBins];            // this block's sums of 64 bits, as two words: shared memory adds 32 bits natively
    uint64_t bins[kBins];       // the row's
    uint64_t list[kListMax];    // this block's tokens
    uint64_t merged[kListMax];  // the row's
    uint64_t masses[kListMax];
    uint64_t words[kWarps];
    uint64_t chunk_mass[kMaxChunks];
    float chunk_max[kMaxChunks], chunk_sum[kMaxChunks];
    uint64_t above, in_bin, wanted;
    float max, sum;
    int32_t first_chunk;  // the lowest that has max
    uint32_t list_size;
    int32_t bin;
    Cut cut;
};

// The order in which filters keep tokens: larger first. No two tokens have the same.
__device__ __forceinline__ uint64_t rank_of(uint32_t key, int32_t id) {
    return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ uint32_t key_of(uint64_t rank) {
    return static_cast<uint32_t>(rank >> 32);
}
__device__ __forceinline__ int32_t id_of(uint64_t rank) {
    return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return std::bit_cast<float>(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// The sum over the block; every thread gets it.
__device__ __forceinline__ uint64_t block_sum_u64(uint64_t x, uint64_t* words) {
    x = warp_sum_u64(x);
    __syncthreads();  // words may still be read from an earlier call
    if (threadIdx.x % 32 == 0) {
        words[threadIdx.x / 32] = x;
    }
    __syncthreads();
    uint64_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        sum += words[warp];
    }
    return sum;
}

// Octaves below the largest logit, times kBinsPerOctave: grows as the logit falls. NaN for NaN.
__device__ __forceinline__ float distance_of(float x, float max, float scale) {
    return (x >= max ? 0.0f : (max - x) * scale) * kBinsPerOctave;
}
constexpr float kNoMass = 41.0f * kBinsPerOctave;  // from this distance on, and at NaN, a token has no mass

template <typename T>
struct Row {
    const T* slice;      // shared memory, chunks * kChunk<T>; -inf past the row's end
    int32_t first_id;    // of the slice
    int32_t chunks;      // of this block, perhaps 0
    int32_t num_chunks;  // of the row
    int32_t chunks_per_block;
};

// f(at, logits): at is the place in the slice of kVec logits of chunk `chunk` that this lane owns; they grow.
template <int kUnroll, typename T, typename F>
__device__ __forceinline__ void for_vectors(const Row<T>& row, int chunk, F f) {
    constexpr int kVec = kVecElements<T>;
#pragma unroll kUnroll
    for (int j = 0; j < kChunkVecs; ++j) {
        const int at = chunk * kChunk<T> + (j * 32 + static_cast<int>(threadIdx.x % 32)) * kVec;
        const auto v = load_vec<kVec>(row.slice + at);
        float x[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            x[i] = to_float(v[i]);
        }
        f(j, at, x);
    }
}

// f(id, logit) for the tokens of a chunk that this lane owns and wants(id, logit); few, so that it pays to pick them
// first: lanes take their next one together. A lane's ids grow.
template <typename T, typename Wants, typename F>
__device__ __forceinline__ void for_some(const Row<T>& row, int chunk, Wants wants, F f) {
    constexpr int kVec = kVecElements<T>;
    uint32_t picked = 0;
    for_vectors<2>(row, chunk, [&](int j, int at, const float (&x)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            picked |= wants(row.first_id + at + i, x[i]) ? 1u << (j * kVec + i) : 0;
        }
    });
    while (picked != 0) {
        const int bit = __ffs(static_cast<int>(picked)) - 1;
        picked &= picked - 1;
        const int j = bit / kVec, i = bit % kVec;
        const int at = chunk * kChunk<T> + (j * 32 + static_cast<int>(threadIdx.x % 32)) * kVec + i;
        f(row.first_id + at, to_float(row.slice[at]));
    }
}

// 16 bytes of logits from `id` on, -inf past the row's end.
template <typename T>
__device__ __forceinline__ Vec<uint32_t, 4> load_words(const T* logits, int32_t id, int32_t vocab_size) {
    if (id + kVecElements<T> <= vocab_size) {
        return load_vec<4>(reinterpret_cast<const uint32_t*>(logits + id));
    }
    constexpr int kInWord = 4 / sizeof(T);
    const T lowest = from_float<T>(-INFINITY);
    Vec<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = 0;
#pragma unroll
        for (int j = 0; j < kInWord; ++j) {
            const int32_t at = id + i * kInWord + j;
            const T x = at < vocab_size ? logits[at] : lowest;
            if constexpr (sizeof(T) == 2) {
                words[i] |= static_cast<uint32_t>(std::bit_cast<uint16_t>(x)) << (16 * j);
            } else {
                words[i] = std::bit_cast<uint32_t>(x);
            }
        }
    }
    return words;
}

// Brings the slice to shared memory; of each chunk the largest logit and the sum of exponentials relative to it.
template <typename T>
__device__ __forceinline__ void load_slice(const T* logits, int32_t vocab_size, const Row<T>& row, T* slice,
                                           Shared& s) {
    constexpr int kVec = kVecElements<T>;
    const int lane = threadIdx.x % 32;
    using Words = Vec<uint32_t, 4>;
    Words words[kChunkVecs], next[kChunkVecs];
    const auto load = [&](int chunk, Words(&to)[kChunkVecs]) {
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            to[j] = load_words(logits, row.first_id + chunk * kChunk<T> + (j * 32 + lane) * kVec, vocab_size);
        }
    };
    // f(logit) for the lane's tokens of the chunk at hand, which adds to sum; a vector at a time, for registers' sake.
    const auto for_logits = [&](float& sum, auto f) {
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            forget(words[j]);
            const auto v = *reinterpret_cast<const Vec<T, kVec>*>(&words[j]);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                f(to_float(v[i]));
            }
            asm volatile("" : "+f"(sum));
        }
    };
    if (threadIdx.x / 32 < row.chunks) {
        load(threadIdx.x / 32, words);
    }
    for (int chunk = threadIdx.x / 32; chunk < row.chunks; chunk += kWarps) {
        if (chunk + kWarps < row.chunks) {
            load(chunk + kWarps, next);
        }
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            store_vec(reinterpret_cast<uint32_t*>(slice + chunk * kChunk<T> + (j * 32 + lane) * kVec), words[j]);
        }
        float max = -INFINITY, sum = 0.0f;
        for_logits(max, [&](float x) { max = fmaxf(max, x); });  // of NaN and -inf: -inf
        max = warp_max(max);
        for_logits(sum, [&](float x) { sum += exp2_approx((x - max) * kLog2E); });
        sum = warp_sum(sum);
        if (sum != sum) {  // a NaN among the logits, or an infinite largest one
            sum = 0.0f;
            if (max > -INFINITY) {
#pragma unroll 1
                for (int i = 0; i < kChunkVecs * kVec; ++i) {
                    const int at = chunk * kChunk<T> + (i / kVec * 32 + lane) * kVec + i % kVec;
                    const float x = clean_logit(to_float(slice[at]));
                    sum += x == max ? 1.0f : exp2_approx((x - max) * kLog2E);
                }
                sum = warp_sum(sum);
            }
        }
        if (lane == 0) {
            s.chunk_max[chunk] = max;
            s.chunk_sum[chunk] = sum;
        }
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            words[j] = next[j];
        }
    }
}

// By warp 0: largest logit, log-softmax's sum and first chunk of the row from those of the chunks, in their order.
template <typename T>
__device__ __forceinline__ void combine_chunks(const Row<T>& row, Shared& s) {
    const int lane = threadIdx.x % 32;
    float max = -INFINITY, sum = 0.0f;
    int first = INT32_MAX;
    const auto rescale = [](float sum, float from, float to) {
        return from == to ? sum : sum * exp2_approx((from - to) * kLog2E);
    };
#pragma unroll 4
    for (int chunk = lane; chunk < row.num_chunks; chunk += 32) {
        const int rank = chunk / row.chunks_per_block, at = chunk - rank * row.chunks_per_block;
        const Shared& other = *in_block(&s, rank);
        const float chunk_max = other.chunk_max[at], chunk_sum = other.chunk_sum[at];
        if (chunk_max > max) {
            sum = rescale(sum, max, chunk_max) + chunk_sum;
            max = chunk_max;
            first = chunk;
        } else {
            sum += rescale(chunk_sum, chunk_max, max);
        }
    }
    const float row_max = warp_max(max);
    sum = warp_sum(rescale(sum, max, row_max));
    first = static_cast<int>(__reduce_min_sync(kAllLanes, max == row_max ? static_cast<unsigned>(first) : INT32_MAX));
    if (lane == 0) {
        s.max = row_max;
        s.sum = sum;
        s.first_chunk = first == INT32_MAX ? 0 : first;
    }
}

// Zeroes this block's histogram.
__device__ __forceinline__ void clear_bins(Shared& s) {
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) {
        store_vec(s.low + 4 * i, Vec<uint32_t, 4>{});
        store_vec(s.high + 4 * i, Vec<uint32_t, 4>{});
    }
    __syncthreads();
}

// kN amounts to their bins; a bin of -1 takes none.
template <int kN>
__device__ __forceinline__ void add_to_bins(Shared& s, const int (&bins)[kN], const uint64_t (&amounts)[kN]) {
    uint32_t before[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
        before[i] = bins[i] >= 0 ? atomicAdd(&s.low[bins[i]], static_cast<uint32_t>(amounts[i])) : 0;
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
        const bool carry = before[i] + static_cast<uint32_t>(amounts[i]) < before[i];
        const uint32_t high = static_cast<uint32_t>(amounts[i] >> 32) + (carry ? 1 : 0);
        if (bins[i] >= 0 && high != 0) {
            atomicAdd(&s.high[bins[i]], high);
        }
    }
}

// The row's bins, in every block, from the blocks' own: each block adds up its part of the bins for all.
__device__ __forceinline__ void sum_blocks(Shared& s) {
    cluster_sync();
    const int size = cluster_size(), part = kBins / size, first = cluster_rank() * part;
    for (int bin = first + static_cast<int>(threadIdx.x); bin < first + part; bin += kThreads) {
        uint64_t sum = 0;
#pragma unroll 4
        for (int rank = 0; rank < size; ++rank) {
            const Shared& other = *in_block(&s, rank);
            sum += static_cast<uint64_t>(other.high[bin]) << 32 | other.low[bin];
        }
        for (int rank = 0; rank < size; ++rank) {
            in_block(&s, rank)->bins[bin] = sum;
        }
    }
    cluster_sync();
}

// The first bin at which the row's sum reaches need(total), into s; -1 where that is all of it and all_or_bin says so.
// Thread t looks at bins 4 t to 4 t + 3.
template <typename Need>
__device__ __forceinline__ void find_bin(Shared& s, bool all_or_bin, Need need) {
    constexpr int kOwn = kBins / kThreads;
    static_assert(kOwn == 4);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto bins = load_vec<2>(&s.bins[threadIdx.x * kOwn]), bins2 = load_vec<2>(&s.bins[threadIdx.x * kOwn + 2]);
    const uint64_t own = bins[0] + bins[1] + bins2[0] + bins2[1];
    uint64_t upto = warp_inclusive_scan(own, lane);
    if (lane == 31) {
        s.words[warp] = upto;
    }
    __syncthreads();
    uint64_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        upto += w < warp ? s.words[w] : 0;
        total += s.words[w];
    }
    const uint64_t wanted = need(total);
    uint64_t above = upto - own;
    if (threadIdx.x == 0) {
        s.wanted = wanted;
        s.bin = -1;
    }
    __syncthreads();
    if (!(all_or_bin && wanted >= total) && above < wanted && wanted <= upto) {  // one thread
        int i = 0;
        uint64_t here = bins[0];
        const uint64_t rest[kOwn - 1] = {bins[1], bins2[0], bins2[1]};
#pragma unroll
        for (int j = 0; j < kOwn - 1; ++j) {
            if (i == j && above + here < wanted) {
                above += here;
                here = rest[j];
                i = j + 1;
            }
        }
        s.bin = static_cast<int>(threadIdx.x) * kOwn + i;
        s.above = above;
        s.in_bin = here;
    }
    __syncthreads();
}

// Every block's list into s.merged of every block. Returns the number of tokens, or -1 where they do not fit.
__device__ __forceinline__ int merge_lists(Shared& s) {
    cluster_sync();
    const int blocks = cluster_size();
    uint32_t begin = 0;
#pragma unroll 4
    for (int rank = 0; rank < blocks; ++rank) {
        const Shared& other = *in_block(&s, rank);
        const uint32_t count = other.list_size;
        if (threadIdx.x >= begin && threadIdx.x < begin + count) {
            s.merged[threadIdx.x] = other.list[threadIdx.x - begin];
        }
        begin += count;
    }
    __syncthreads();
    return begin <= kListMax ? static_cast<int>(begin) : -1;
}

}  // namespace fastkernels::sampling
