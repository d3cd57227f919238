// sample (formulas and integers: token_mass.h; the same tokens as sample.cu and sample.cpp) with a cluster a row.
//
//   logits  [num_seqs, vocab_size] bf16 | fp16 | fp32 -> out_ids, out_logprobs  [num_seqs]
//
// A row is cut into chunks of kChunkVecs vectors a lane; a cluster of 1 to 8 blocks owns a row, a block consecutive
// chunks, which it reads once and keeps in shared memory, and a warp one chunk at a time. Every pass gives a number a
// chunk, and those are added in the order of the chunks: neither the size of the cluster nor the batch changes a
// result.
//
//   maxima    of each chunk the largest logit and sum(exp(logit - it)): greedy and the log-softmax need no more
//   filter    a histogram over 2048 bins of the distance from the largest logit, counts for top-k and exact masses for
//             top-p; block 0 adds the blocks' up and finds the bin at the edge
//   gather    what is above the edge and in its bin, when that is at most kListMax tokens: block 0 finishes the row
//             among them. Otherwise the tokens of the bin alone, which give the exact cut; a bin with more than
//             kListMax tokens is split 11 bits of (key, ~id) at a time until it fits.
//   draw      the kept mass of each chunk; the block that owns the drawn one finds the token
//
// Bytes: vocab_size * sizeof(T) a row, once.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/cluster.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "sampling/sample_sm90.h"
#include "sampling/token_mass.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkVecs = 4;
constexpr int kMaxChunks = 96;    // of a block: 192 KB
constexpr int kRoomyChunks = 40;  // of a block: two blocks an SM
constexpr int kMaxCluster = 8;    // what every GPU with clusters takes
constexpr int kBins = 2048;
constexpr int kDigitBits = 11;
constexpr int kListMax = kThreads;  // a thread a token
constexpr uint64_t kManyTokens = 16 * kListMax;
constexpr float kBinsPerOctave = 49.0f;  // 41 octaves have mass
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

template <typename T>
constexpr int kChunk = 32 * kVecElements<T> * kChunkVecs;

enum class Next : int32_t { keep_all, gather_all, gather_bin, split_bin, cut, done };

// What block 0 tells the others.
struct Decision {
    Next next;
    int32_t bin;
    uint64_t rest;  // amount wanted of the bin
    Cut cut;
};

struct alignas(16) Shared {
    uint32_t low[kBins], high[kBins];  // a 64-bit sum as two words, since shared memory adds 32 bits natively
    uint64_t list[kListMax];           // of this block
    uint64_t merged[kListMax];         // of all blocks; block 0 only
    uint64_t masses[kListMax];
    uint64_t words[kWarps];
    uint64_t chunk_mass[kMaxChunks];
    float chunk_max[kMaxChunks], chunk_sum[kMaxChunks];
    Decision decision;
    float max, sum;
    int32_t first_chunk;  // the lowest that has max
    uint32_t list_size;
    int32_t digit;
    uint64_t above, in_bin, wanted;
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

__device__ __forceinline__ uint64_t warp_sum_u64(uint64_t x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(kAllLanes, x, offset);
    }
    return x;
}

__device__ __forceinline__ uint64_t warp_inclusive_scan(uint64_t x, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t before = __shfl_up_sync(kAllLanes, x, offset);
        x += lane >= offset ? before : 0;
    }
    return x;
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

// The bin of a logit, by its distance from the largest: grows as the logit falls; -1 for one without mass (and NaN).
__device__ __forceinline__ int bin_of(float x, float max, float scale) {
    const float octaves = x >= max ? 0.0f : (max - x) * scale;
    return octaves < 41.0f ? static_cast<int>(octaves * kBinsPerOctave) : -1;
}

template <typename T>
struct Row {
    const T* slice;      // shared memory, chunks * kChunk<T>; -inf past the row's end
    int32_t first_id;    // of the slice
    int32_t chunks;      // of this block, perhaps 0
    int32_t num_chunks;  // of the row
    int32_t chunks_per_block;
};

// f(id, logit) for the tokens of chunk `chunk` of the block that this lane owns; a lane's ids grow.
template <typename T, typename F>
__device__ __forceinline__ void for_chunk(const Row<T>& row, int chunk, F f) {
    constexpr int kVec = kVecElements<T>;
#pragma unroll 2
    for (int j = 0; j < kChunkVecs; ++j) {
        const int at = chunk * kChunk<T> + (j * 32 + static_cast<int>(threadIdx.x % 32)) * kVec;
        const auto v = load_vec<kVec>(row.slice + at);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            f(row.first_id + at + i, to_float(v[i]));
        }
    }
}

template <typename T, typename F>
__device__ __forceinline__ void for_each(const Row<T>& row, F f) {
    for (int chunk = threadIdx.x / 32; chunk < row.chunks; chunk += kWarps) {
        for_chunk(row, chunk, f);
    }
}

// Brings the slice to shared memory; of each chunk the largest logit and the sum of exponentials relative to it.
template <typename T>
__device__ __forceinline__ void load_slice(const T* logits, int32_t vocab_size, const Row<T>& row, T* slice,
                                           Shared& s) {
    constexpr int kVec = kVecElements<T>;
    const int lane = threadIdx.x % 32;
    for (int chunk = threadIdx.x / 32; chunk < row.chunks; chunk += kWarps) {
        Vec<T, kVec> v[kChunkVecs];
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            const int32_t id = row.first_id + chunk * kChunk<T> + (j * 32 + lane) * kVec;
            if (id + kVec <= vocab_size) {
                v[j] = load_vec<kVec>(logits + id);
            } else {
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    v[j][i] = id + i < vocab_size ? logits[id + i] : from_float<T>(-INFINITY);
                }
            }
        }
        float max = -INFINITY;
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
            store_vec(slice + chunk * kChunk<T> + (j * 32 + lane) * kVec, v[j]);
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                max = fmaxf(max, to_float(v[j][i]));  // of NaN and -inf: -inf
            }
        }
        max = warp_max(max);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kChunkVecs; ++j) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum += exp2_approx((to_float(v[j][i]) - max) * kLog2E);
            }
        }
        sum = warp_sum(sum);
        if (sum != sum) {  // a NaN among the logits, or an infinite largest one
            sum = 0.0f;
            if (max > -INFINITY) {
#pragma unroll
                for (int j = 0; j < kChunkVecs; ++j) {
#pragma unroll
                    for (int i = 0; i < kVec; ++i) {
                        const float x = clean_logit(to_float(v[j][i]));
                        sum += x == max ? 1.0f : exp2_approx((x - max) * kLog2E);
                    }
                }
                sum = warp_sum(sum);
            }
        }
        if (lane == 0) {
            s.chunk_max[chunk] = max;
            s.chunk_sum[chunk] = sum;
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

// Adds to this block's histogram: bin(id, x) is -1 for tokens that do not count; amount(x).
template <typename T, typename Bin, typename Amount>
__device__ __forceinline__ void add_up(const Row<T>& row, Shared& s, Bin bin, Amount amount) {
    for_each(row, [&](int32_t id, float x) {
        const int at = bin(id, x);
        if (at >= 0) {
            const uint64_t here = amount(x);
            const uint32_t low = static_cast<uint32_t>(here);
            const uint32_t before = atomicAdd(&s.low[at], low);
            const uint32_t high = static_cast<uint32_t>(here >> 32) + (before + low < before ? 1u : 0u);
            if (high != 0) {
                atomicAdd(&s.high[at], high);
            }
        }
    });
}

// By block 0: the first bin at which the sum over all blocks reaches need(total), or -1 where that is all and
// all_or_bin says so. Thread t has bins 4 t to 4 t + 3.
template <typename Need>
__device__ __forceinline__ void find_bin(Shared& s, bool all_or_bin, Need need) {
    constexpr int kOwn = kBins / kThreads;
    static_assert(kOwn == 4);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t bins[kOwn] = {};
    const int num_blocks = cluster_size();
#pragma unroll 2
    for (int rank = 0; rank < num_blocks; ++rank) {
        const Shared& other = *in_block(&s, rank);
        const auto low = load_vec<kOwn>(&other.low[threadIdx.x * kOwn]);
        const auto high = load_vec<kOwn>(&other.high[threadIdx.x * kOwn]);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            bins[i] += static_cast<uint64_t>(high[i]) << 32 | low[i];
        }
    }
    const uint64_t own = bins[0] + bins[1] + bins[2] + bins[3];
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
        s.digit = -1;
    }
    __syncthreads();
    if (!(all_or_bin && wanted >= total) && above < wanted && wanted <= upto) {  // one thread
        int i = 0;
#pragma unroll
        for (int j = 0; j < kOwn - 1; ++j) {
            if (i == j && above + bins[j] < wanted) {
                above += bins[j];
                i = j + 1;
            }
        }
        s.digit = static_cast<int>(threadIdx.x) * kOwn + i;
        s.above = above;
        s.in_bin = i == 0 ? bins[0] : i == 1 ? bins[1] : i == 2 ? bins[2] : bins[3];
    }
    __syncthreads();
}

// Every block's list into block 0's s.merged. Returns the number of tokens, or -1 where they do not fit.
__device__ __forceinline__ int merge_lists(Shared& s) {
    const int num_blocks = cluster_size();
    uint32_t size = 0;
    for (int rank = 0; rank < num_blocks; ++rank) {
        size += in_block(&s, rank)->list_size;
    }
    if (size > kListMax) {
        return -1;
    }
    uint32_t begin = 0;
    for (int rank = 0; rank < num_blocks; ++rank) {
        const Shared& other = *in_block(&s, rank);
        const uint32_t count = other.list_size;
        if (threadIdx.x >= begin && threadIdx.x < begin + count) {
            s.merged[threadIdx.x] = other.list[threadIdx.x - begin];
        }
        begin += count;
    }
    __syncthreads();
    return static_cast<int>(size);
}

// Sum of s.masses[j] over the `size` tokens of s.merged for which before(s.merged[j]).
template <typename Before>
__device__ __forceinline__ uint64_t sum_before(const Shared& s, int size, Before before) {
    uint64_t sum = 0;
#pragma unroll 4
    for (int j = 0; j < size; ++j) {
        sum += before(s.merged[j]) ? s.masses[j] : 0;
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void write_result(const SampleParams& p, int64_t seq, int32_t id, float x, const Shared& s) {
    p.out_ids[seq] = id;
    p.out_logprobs[seq] = x > -INFINITY ? (x == s.max ? 0.0f : x - s.max) - logf(s.sum) : -INFINITY;
}

// The parameters of a row, and how its tokens are seen.
struct Settings {
    float temperature, scale, top_p, min_p, max;
    int32_t top_k, vocab_size;
};

// By block 0: filters and draw among the tokens of s.merged, which hold all that the filters keep. need: the mass that
// top-p wants where top-k does not come before it, else 0.
template <typename T>
__device__ __forceinline__ void finish_in_list(const SampleParams& p, int64_t seq, const Settings& settings, int size,
                                               uint64_t need, Shared& s) {
    const int i = threadIdx.x;
    const bool inside = i < size;
    const uint64_t rank = inside ? s.merged[i] : 0;
    const float x = logit_of(key_of(rank));
    bool kept = inside;
    const auto share = [&](uint64_t mass) {  // this token's amount, for sum_before
        __syncthreads();
        s.masses[i] = mass;
        __syncthreads();
    };
    if (settings.top_k > 0 && settings.top_k < size) {
        share(inside ? 1 : 0);
        kept = kept && sum_before(s, size, [&](uint64_t other) { return other > rank; }) <
                           static_cast<uint64_t>(settings.top_k);
    }
    const uint64_t mass = inside ? token_mass(x, settings.max, settings.scale) : 0;
    if (settings.top_p < 1.0f) {
        share(kept ? mass : 0);
        if (need == 0) {
            need = top_p_mass(settings.top_p, block_sum_u64(kept ? mass : 0, s.words));
        }
        kept = kept && sum_before(s, size, [&](uint64_t other) { return other > rank; }) < need;
    }
    const Cut all{0, settings.vocab_size - 1};
    const Cut cut = cut_min_p(all, settings.min_p, settings.max, settings.temperature, settings.vocab_size);
    kept = kept && is_kept(cut, key_of(rank), id_of(rank));
    const uint64_t own = kept ? mass : 0;
    share(own);
    const uint64_t target = scale_random(philox_u64(p.seeds[seq], p.steps[seq]), block_sum_u64(own, s.words));
    const uint64_t before = sum_before(s, size, [&](uint64_t other) { return id_of(other) < id_of(rank); });
    if (before <= target && target < before + own) {  // one thread
        write_result<T>(p, seq, id_of(rank), x, s);
    }
}

// By block 0: of the tokens of s.merged, one bin's, the last that is needed to reach `rest`.
__device__ __forceinline__ void find_cut(const Settings& settings, int size, uint64_t rest, bool by_mass, Shared& s) {
    const int i = threadIdx.x;
    const uint64_t rank = i < size ? s.merged[i] : 0;
    const uint64_t own = i >= size ? 0
                         : by_mass ? token_mass(logit_of(key_of(rank)), settings.max, settings.scale)
                                   : uint64_t{1};
    s.masses[i] = own;
    __syncthreads();
    const uint64_t before = sum_before(s, size, [&](uint64_t other) { return other > rank; });
    if (before < rest && rest <= before + own) {  // one thread
        s.decision.cut = {key_of(rank), id_of(rank)};
    }
}

// Block 0's decision to every block's shared memory, once all of its threads are here.
__device__ __forceinline__ void broadcast(Shared& s) {
    if (cluster_rank() == 0) {
        __syncthreads();
        if (threadIdx.x > 0 && static_cast<int>(threadIdx.x) < cluster_size()) {
            in_block(&s, static_cast<int>(threadIdx.x))->decision = s.decision;
        }
    }
    cluster_sync();
}

// One filter: the cut within `cut` whose amounts, summed by falling rank, reach top_k or top-p's mass. True when the
// row was finished on the way.
template <typename T>
__device__ __forceinline__ bool shrink(const SampleParams& p, int64_t seq, const Row<T>& row, const Settings& settings,
                                       bool by_mass, Shared& s, Cut& cut) {
    const bool is_first = cluster_rank() == 0;
    const bool cuts = cut.key != 0;
    int coarse = -1;                       // the bin at the edge
    uint64_t prefix = 0, prefix_mask = 0;  // of the ranks in it that are looked at
    uint64_t rest = 0;
    const auto in_cut = [&](int32_t id, float x) { return !cuts || is_kept(cut, ordered_key(clean_logit(x)), id); };
    for (int shift = 64;; shift = shift > kDigitBits ? shift - kDigitBits : 0) {
        // Histogram: of distances first, of 11 bits of the rank at `shift` after that, largest in bin 0.
        for (int i = threadIdx.x; i < kBins; i += kThreads) {
            s.low[i] = 0;
            s.high[i] = 0;
        }
        __syncthreads();
        const auto amount = [&](float x) {
            return by_mass ? token_mass(x, settings.max, settings.scale) : uint64_t{1};
        };
        const auto digit_of = [&](uint64_t rank) { return kBins - 1 - static_cast<int>(rank >> shift & (kBins - 1)); };
        if (shift == 64) {
            add_up(
                row, s,
                [&](int32_t id, float x) {
                    const int bin = bin_of(x, settings.max, settings.scale);
                    return bin >= 0 && in_cut(id, x) ? bin : -1;
                },
                amount);
        } else {
            add_up(
                row, s,
                [&](int32_t id, float x) {
                    const uint64_t rank = rank_of(ordered_key(x), id);
                    return bin_of(x, settings.max, settings.scale) == coarse && in_cut(id, x) &&
                                   (rank & prefix_mask) == prefix
                               ? digit_of(rank)
                               : -1;
                },
                amount);
        }
        cluster_sync();
        if (is_first) {
            find_bin(s, shift == 64, [&](uint64_t total) {
                return shift < 64 ? rest
                       : by_mass  ? top_p_mass(settings.top_p, total)
                                  : static_cast<uint64_t>(settings.top_k);
            });
            if (threadIdx.x == 0) {
                Next next = Next::keep_all;
                if (s.digit >= 0) {
                    // No token of these bins has less than the mass at the far end of the last.
                    const float least = 40.0f - static_cast<float>(s.digit + 1) / kBinsPerOctave;
                    const float most_tokens = by_mass ? static_cast<float>(s.above + s.in_bin) * exp2f(-least)
                                                      : static_cast<float>(s.above + s.in_bin);
                    const bool fits = most_tokens <= static_cast<float>(by_mass ? kManyTokens : kListMax);
                    next = shift == 64 && fits ? Next::gather_all : Next::gather_bin;
                }
                s.decision.next = next;
                s.decision.bin = s.digit;
                s.decision.rest = s.wanted - s.above;
            }
        }
        broadcast(s);
        Next next = s.decision.next;
        if (next == Next::keep_all) {
            return false;
        }
        if (shift == 64) {
            coarse = s.decision.bin;
            rest = s.decision.rest;
        } else {
            prefix_mask = ~uint64_t{0} << shift;
            prefix = (prefix & ~(static_cast<uint64_t>(kBins - 1) << shift)) |
                     static_cast<uint64_t>(kBins - 1 - s.decision.bin) << shift;
            rest = s.decision.rest;
        }
        while (next == Next::gather_all || next == Next::gather_bin) {
            __syncthreads();  // all have read the decision
            if (threadIdx.x == 0) {
                s.list_size = 0;
            }
            __syncthreads();
            const bool all = next == Next::gather_all;
            for_each(row, [&](int32_t id, float x) {
                const int bin = bin_of(x, settings.max, settings.scale);
                if (bin == coarse || (all && bin >= 0 && bin < coarse)) {
                    const uint64_t rank = rank_of(ordered_key(x), id);
                    if (in_cut(id, x) && (rank & prefix_mask) == prefix) {
                        const uint32_t at = atomicAdd(&s.list_size, 1u);
                        if (at < kListMax) {
                            s.list[at] = rank;
                        }
                    }
                }
            });
            cluster_sync();
            if (is_first) {
                const int size = merge_lists(s);
                if (size < 0) {
                    if (threadIdx.x == 0) {
                        s.decision.next = all ? Next::gather_bin : Next::split_bin;
                    }
                } else if (all) {
                    finish_in_list<T>(p, seq, settings, size, by_mass ? s.wanted : 0, s);
                    if (threadIdx.x == 0) {
                        s.decision.next = Next::done;
                    }
                } else {
                    find_cut(settings, size, rest, by_mass, s);
                    if (threadIdx.x == 0) {
                        s.decision.next = Next::cut;
                    }
                }
            }
            broadcast(s);
            next = s.decision.next;
        }
        if (next == Next::done) {
            return true;
        }
        if (next == Next::cut) {
            cut = s.decision.cut;
            return false;
        }
    }
}

// The token at which the kept mass, summed by id, passes the random number; by the block that owns it.
template <typename T>
__device__ __forceinline__ void draw(const SampleParams& p, int64_t seq, const Row<T>& row, const Settings& settings,
                                     const Cut& cut, Shared& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto kept_mass = [&](int32_t id, float x) {
        return is_kept(cut, ordered_key(clean_logit(x)), id) ? token_mass(x, settings.max, settings.scale)
                                                             : uint64_t{0};
    };
    for (int chunk = warp; chunk < row.chunks; chunk += kWarps) {
        uint64_t mass = 0;
        for_chunk(row, chunk, [&](int32_t id, float x) { mass += kept_mass(id, x); });
        mass = warp_sum_u64(mass);
        if (lane == 0) {
            s.chunk_mass[chunk] = mass;
        }
    }
    cluster_sync();
    if (warp != 0) {
        return;
    }
    const auto mass_of = [&](int chunk) {
        const int rank = chunk / row.chunks_per_block;
        return chunk < row.num_chunks ? in_block(&s, rank)->chunk_mass[chunk - rank * row.chunks_per_block]
                                      : uint64_t{0};
    };
    uint64_t total = 0;
#pragma unroll 4
    for (int chunk = lane; chunk < row.num_chunks; chunk += 32) {
        total += mass_of(chunk);
    }
    const uint64_t target = scale_random(philox_u64(p.seeds[seq], p.steps[seq]), warp_sum_u64(total));
    uint64_t passed = 0;
    int drawn = 0;
    for (int first = 0; first < row.num_chunks; first += 32) {
        const uint64_t upto = passed + warp_inclusive_scan(mass_of(first + lane), lane);
        const unsigned after = __ballot_sync(kAllLanes, upto > target);
        if (after != 0) {
            drawn = __ffs(static_cast<int>(after)) - 1;
            const uint64_t before = __shfl_sync(kAllLanes, upto, drawn > 0 ? drawn - 1 : 0);
            passed = drawn > 0 ? before : passed;
            drawn += first;
            break;
        }
        passed = __shfl_sync(kAllLanes, upto, 31);
    }
    const int chunk = drawn - cluster_rank() * row.chunks_per_block;
    if (chunk < 0 || chunk >= row.chunks) {
        return;
    }
    constexpr int kVec = kVecElements<T>;
    for (int j = 0; j < kChunkVecs; ++j) {
        const int at = chunk * kChunk<T> + (j * 32 + lane) * kVec;
        uint64_t sum = 0;
#pragma unroll 1
        for (int i = 0; i < kVec; ++i) {
            sum += kept_mass(row.first_id + at + i, to_float(row.slice[at + i]));
        }
        const uint64_t upto = passed + warp_inclusive_scan(sum, lane);
        if (upto - sum <= target && target < upto) {  // one lane of the warp
            uint64_t here = upto - sum;
#pragma unroll 1
            for (int i = 0; i < kVec; ++i) {
                const float x = to_float(row.slice[at + i]);
                here += kept_mass(row.first_id + at + i, x);
                if (here > target) {
                    write_result<T>(p, seq, row.first_id + at + i, x, s);
                    break;
                }
            }
        }
        passed = __shfl_sync(kAllLanes, upto, 31);
        if (passed > target) {
            return;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    sample_cluster_kernel(const SampleParams p, int num_chunks, int chunks_per_block) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    T* slice = reinterpret_cast<T*>(memory + sizeof(Shared));
    static_assert(sizeof(Shared) % 16 == 0);
    const int block = cluster_rank();
    const int64_t seq = blockIdx.x / static_cast<unsigned>(cluster_size());
    const int first_chunk = block * chunks_per_block;
    const Row<T> row{slice, first_chunk * kChunk<T>, max(0, min(chunks_per_block, num_chunks - first_chunk)),
                     num_chunks, chunks_per_block};
    const int32_t vocab_size = static_cast<int32_t>(p.vocab_size);
    pdl_launch_dependents();
    pdl_wait();
    const float temperature = p.temperature[seq];
    const int32_t top_k = p.top_k[seq];
    load_slice(static_cast<const T*>(p.logits) + seq * p.logits_stride, vocab_size, row, slice, s);
    cluster_sync();
    if (threadIdx.x < 32) {
        combine_chunks(row, s);
    }
    __syncthreads();
    const float max = s.max;
    if (!(temperature > 0.0f) || top_k == 1 || max == -INFINITY) {
        const int chunk = s.first_chunk - first_chunk;
        if (threadIdx.x < 32 && chunk >= 0 && chunk < row.chunks) {
            int32_t lowest = INT32_MAX;
            for_chunk(row, chunk,
                      [&](int32_t id, float x) { lowest = clean_logit(x) == max && id < lowest ? id : lowest; });
            lowest = static_cast<int32_t>(__reduce_min_sync(kAllLanes, static_cast<unsigned>(lowest)));
            if (threadIdx.x == 0) {
                write_result<T>(p, seq, lowest, max, s);
            }
        }
    } else {
        const Settings settings{temperature, kLog2E / temperature, p.top_p[seq], p.min_p[seq], max, top_k, vocab_size};
        Cut cut{0, vocab_size - 1};
        bool done = false;
#pragma unroll 1
        for (int filter = 0; filter < 2 && !done; ++filter) {  // one body for both
            const bool by_mass = filter == 1;
            if (by_mass ? settings.top_p < 1.0f : top_k > 0 && top_k < vocab_size) {
                done = shrink(p, seq, row, settings, by_mass, s, cut);
            }
        }
        if (!done) {
            draw(p, seq, row, settings, cut_min_p(cut, settings.min_p, max, temperature, vocab_size), s);
        }
    }
    cluster_sync();  // the others may still read this block's shared memory
}

}  // namespace

bool sample_in_clusters(const SampleParams& p, void* stream) {
    if (compute_capability() < 90 || reinterpret_cast<uintptr_t>(p.logits) % 16 != 0) {
        return false;
    }
    bool fits = false;
    visit_float(p.dtype, [&]<typename T>() {
        const int64_t chunks = (p.vocab_size + kChunk<T> - 1) / kChunk<T>;
        if (p.logits_stride % kVecElements<T> != 0 || chunks > kMaxCluster * kMaxChunks) {
            return;
        }
        // As many blocks a row as its chunks need to leave two blocks an SM room, and then as fill the GPU once.
        int64_t cluster = 1;
        const auto chunks_per_block = [&] { return (chunks + cluster - 1) / cluster; };
        while (cluster < kMaxCluster &&
               (chunks_per_block() > kRoomyChunks || (2 * cluster <= chunks && p.num_seqs * cluster <= num_sms()))) {
            cluster *= 2;
        }
        const size_t shared_bytes = sizeof(Shared) + static_cast<size_t>(chunks_per_block()) * kChunk<T> * sizeof(T);
        const auto kernel = sample_cluster_kernel<T>;
        check_cuda(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
        cudaLaunchAttribute attributes[2]{};
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(p.num_seqs * cluster));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = attributes;
        config.numAttrs = 2;
        check_cuda(
            cudaLaunchKernelEx(&config, kernel, p, static_cast<int>(chunks), static_cast<int>(chunks_per_block())),
            "kernel launch");
        fits = true;
    });
    return fits;
}

}  // namespace fastkernels
