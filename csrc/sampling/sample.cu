// The next token of every sequence: temperature, top-k, top-p, min-p, then a draw; or the largest logit (greedy).
// With a block a row, for GPUs without clusters, odd addresses and rows that no cluster holds; else sample_sm90.cu.
//
//   logits  [num_seqs, vocab_size] bf16 | fp16 | fp32 -> out_ids, out_logprobs  [num_seqs]
//
// A block owns a row and a warp a contiguous segment of it, so that sums over the warps run in order of ids. The row is
// read once for the greedy answer and the log-softmax; a filter adds a read for each 8-bit digit of the keys (radix
// selection, no sort) and two where ids tie at its edge; the draw adds two. All but the first come from L2.
// Histograms are kept once a lane: neither the lanes of a warp nor equal digits collide. All sums but the
// log-softmax's are of integers (token_mass.h), and that one's order is fixed.
#include <type_traits>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "sampling/sample_sm90.h"
#include "sampling/token_mass.h"

namespace fastkernels {
namespace {

constexpr int kMaxThreads = 768;  // 80 registers a thread
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kBatch = 2;  // vectors a lane has in flight
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

// 64-bit sums as two words, since shared memory adds 32 bits natively: [bin][lane], bank = lane.
struct Histogram {
    uint32_t low[kBins * 32];
    uint32_t high[kBins * 32];
};

struct Scratch {
    float floats[kMaxWarps];
    uint64_t words[kMaxWarps];
    uint64_t bins[kBins];
    // What one thread or warp found for all.
    uint64_t above, in_bin, rest;
    int32_t digit, warp, id;
};

template <typename T, int kVec>
struct Row {
    const T* logits;
    int32_t vocab_size;
    int32_t begin, end;  // of this warp's segment
};

template <int kVec, typename T>
__device__ __forceinline__ Vec<T, kVec> load_tail(const T* logits, int32_t id, int32_t end) {
    Vec<T, kVec> v;
    if (id + kVec <= end) {
        return load_vec<kVec>(logits + id);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        v[i] = id + i < end ? logits[id + i] : from_float<T>(-INFINITY);
    }
    return v;
}

// f(id, logit) for the warp's segment; a lane's ids grow.
template <typename T, int kVec, typename F>
__device__ __forceinline__ void for_each(const Row<T, kVec>& row, F f) {
    constexpr int kStride = 32 * kVec;
    for (int32_t first = row.begin + static_cast<int32_t>(threadIdx.x % 32) * kVec; first < row.end;
         first += kBatch * kStride) {
        Vec<T, kVec> v[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            v[j] = load_tail<kVec>(row.logits, first + j * kStride, row.end);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                const int32_t id = first + j * kStride + i;
                if (id < row.end) {
                    f(id, clean_logit(to_float(v[j][i])));
                }
            }
        }
    }
}

__device__ __forceinline__ void add(Histogram& histogram, uint32_t bin, uint64_t amount) {
    const uint32_t at = bin * 32 + threadIdx.x % 32, low = static_cast<uint32_t>(amount);
    const uint32_t before = atomicAdd(&histogram.low[at], low);
    const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) {
        atomicAdd(&histogram.high[at], high);
    }
}

// Amounts of the bins into scratch.bins. The lanes' copies are read turned, so that no two threads meet in a bank.
__device__ __forceinline__ void sum_lanes(const Histogram& histogram, Scratch& scratch) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
        uint64_t sum = 0;
        for (int j = 0; j < 32; ++j) {
            const int at = bin * 32 + (bin + j) % 32;
            sum += static_cast<uint64_t>(histogram.high[at]) << 32 | histogram.low[at];
        }
        scratch.bins[bin] = sum;
    }
}

// By one warp: the highest bin such that it and those above hold at least need(total). Lane 31 - l has bins 8 l to 8 l
// + 7.
template <typename Need>
__device__ __forceinline__ void find_bin(Scratch& scratch, Need need) {
    constexpr int kOwn = kBins / 32;
    const int lane = threadIdx.x % 32;
    const int top = kBins - 1 - lane * kOwn;
    uint64_t own = 0;
    for (int i = 0; i < kOwn; ++i) {
        own += scratch.bins[top - i];
    }
    const uint64_t upto = warp_inclusive_scan(own, lane);
    const uint64_t wanted = need(__shfl_sync(kAllLanes, upto, 31));
    uint64_t above = upto - own;
    if (above < wanted && wanted <= upto) {  // one lane
        int bin = top;
        for (int i = 1; i < kOwn && above + scratch.bins[bin] < wanted; ++i) {
            above += scratch.bins[bin--];
        }
        scratch.digit = bin;
        scratch.above = above;
        scratch.in_bin = scratch.bins[bin];
        scratch.rest = wanted - above;  // of this bin, at least 1
    }
}

// The first id at which the sum of amount(id, logit) over ids in order passes target(total of the row); every thread of
// the block gets it. Some id must: target(total) < total.
template <typename T, int kVec, typename Amount, typename Target>
__device__ __forceinline__ int32_t find_in_order(const Row<T, kVec>& row, Scratch& scratch, Amount amount,
                                                 Target target) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    uint64_t own = 0;
    for_each(row, [&](int32_t id, float x) { own += amount(id, x); });
    own = warp_sum_u64(own);
    __syncthreads();  // scratch may still be read from an earlier call
    if (lane == 0) {
        scratch.words[warp] = own;
    }
    __syncthreads();
    // Every warp looks for itself among the segments.
    const uint64_t segment = lane < num_warps ? scratch.words[lane] : 0;
    const uint64_t upto = warp_inclusive_scan(segment, lane);
    const uint64_t wanted = target(__shfl_sync(kAllLanes, upto, 31));
    uint64_t passed = __shfl_sync(kAllLanes, upto - segment, warp);
    if (passed <= wanted && wanted < passed + own) {  // this warp's segment
        for (int32_t tile = row.begin; tile < row.end; tile += 32 * kVec) {
            const int32_t first = tile + lane * kVec;
            const auto v = load_tail<kVec>(row.logits, first, row.end);
            uint64_t sum = 0;
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                sum += first + i < row.end ? amount(first + i, clean_logit(to_float(v[i]))) : 0;
            }
            const uint64_t lanes_upto = passed + warp_inclusive_scan(sum, lane);
            if (lanes_upto - sum <= wanted && wanted < lanes_upto) {  // this lane
                uint64_t at = lanes_upto - sum;
                scratch.id = first;
#pragma unroll 1
                for (int32_t id = first; id < first + kVec && id < row.end; ++id) {
                    at += amount(id, clean_logit(to_float(row.logits[id])));
                    if (at > wanted) {
                        scratch.id = id;
                        break;
                    }
                }
            }
            passed = __shfl_sync(kAllLanes, lanes_upto, 31);
            if (passed > wanted) {
                break;
            }
        }
    }
    __syncthreads();
    return scratch.id;
}

// The smallest cut within `cut` whose amounts, summed from the largest key down, reach need(total of the cut).
// All amounts at one key are equal; they are taken by ascending id.
template <typename T, int kVec, typename Amount, typename Need>
__device__ __forceinline__ Cut shrink(const Row<T, kVec>& row, Cut cut, Histogram& histogram, Scratch& scratch,
                                      Amount amount, Need need) {
    // The lowest 16 bits of a bf16's key and 13 of an fp16's follow from its sign, and are not looked at.
    constexpr int kDigits = std::is_same_v<T, bf16> ? 2 : std::is_same_v<T, fp16> ? 3 : 4;
    uint32_t prefix = 0, prefix_mask = 0;
    uint64_t rest = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
        const int shift = 32 - (digit + 1) * kDigitBits;
        for (int i = threadIdx.x; i < kBins * 32; i += blockDim.x) {
            histogram.low[i] = 0;
            histogram.high[i] = 0;
        }
        __syncthreads();
        for_each(row, [&](int32_t id, float x) {
            const uint32_t key = ordered_key(x);
            if ((key & prefix_mask) == prefix && is_kept(cut, key, id)) {
                add(histogram, key >> shift & (kBins - 1), amount(x));
            }
        });
        __syncthreads();
        sum_lanes(histogram, scratch);
        __syncthreads();
        if (threadIdx.x < 32) {
            find_bin(scratch, [&](uint64_t total) { return digit == 0 ? need(total) : rest; });
        }
        __syncthreads();
        prefix |= static_cast<uint32_t>(scratch.digit) << shift;
        prefix_mask |= static_cast<uint32_t>(kBins - 1) << shift;
        rest = scratch.rest;
        if (rest == scratch.in_bin) {  // the bin is kept whole
            return prefix > cut.key ? Cut{prefix, row.vocab_size - 1} : cut;
        }
    }
    // Some of the ids at one key: each has the amount `one`, and the first ceil(rest / one) of them stay.
    const bool negative = prefix >> 31 == 0;
    const uint32_t key = negative ? prefix | ~prefix_mask : prefix;
    const uint32_t key_bits = key ^ (negative ? 0xffffffffu : 0x80000000u);
    const uint64_t one = amount(std::bit_cast<float>(key_bits));
    const uint64_t before_last = (rest + one - 1) / one - 1;
    const int32_t last_id = find_in_order(
        row, scratch,
        [&](int32_t id, float x) {
            const uint32_t k = ordered_key(x);
            return uint64_t{k == key && is_kept(cut, k, id)};
        },
        [&](uint64_t) { return before_last; });
    return {key, last_id};
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) sample_kernel(const SampleParams p) {
    extern __shared__ __align__(16) unsigned char shared[];
    Histogram& histogram = *reinterpret_cast<Histogram*>(shared);
    __shared__ Scratch scratch;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int32_t vocab_size = static_cast<int32_t>(p.vocab_size);
    // Segments are whole tiles, so that every vector but the row's last is aligned and whole.
    constexpr int kTile = 32 * kVec;
    const int32_t tiles = (vocab_size + kTile - 1) / kTile;
    const int32_t segment = (tiles + num_warps - 1) / num_warps * kTile;
    const int64_t seq = blockIdx.x;
    const Row<T, kVec> row{static_cast<const T*>(p.logits) + seq * p.logits_stride, vocab_size,
                           min(warp * segment, vocab_size), min((warp + 1) * segment, vocab_size)};
    pdl_wait();

    // The largest logit, the lowest id that has it, and sum(exp(logit - max)) at temperature 1.
    float max = -INFINITY, sum = 0.0f;
    int32_t id = INT32_MAX;
    for_each(row, [&](int32_t i, float x) {
        if (x > max || id == INT32_MAX) {
            sum = (x > max ? sum * exp2f((max - x) * kLog2E) : 0.0f) + 1.0f;
            max = x;
            id = i;
        } else {
            sum += x == max ? 1.0f : exp2f((x - max) * kLog2E);
        }
    });
    // Of equal keys the lowest id wins. A thread without tokens has the key of -inf and no id: it never wins.
    uint64_t best = static_cast<uint64_t>(ordered_key(max)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const uint64_t other = __shfl_xor_sync(kAllLanes, best, offset);
        best = other > best ? other : best;
    }
    if (lane == 0) {
        scratch.words[warp] = best;
    }
    __syncthreads();
    for (int w = 0; w < num_warps; ++w) {
        best = scratch.words[w] > best ? scratch.words[w] : best;
    }
    const float own_max = max;
    int32_t chosen = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(best));
    max = clean_logit(to_float(row.logits[chosen]));
    sum = block_sum(own_max == max ? sum : sum * exp2f((own_max - max) * kLog2E), scratch.floats);
    pdl_launch_dependents();

    const float temperature = p.temperature[seq];
    const int32_t top_k = p.top_k[seq];
    if (temperature > 0.0f && top_k != 1 && max > -INFINITY) {
        const float scale = kLog2E / temperature;
        const float top_p = p.top_p[seq];
        Cut cut{0, vocab_size - 1};
#pragma unroll 1
        for (int filter = 0; filter < 2; ++filter) {  // one body for both: top-k counts tokens, top-p their mass
            const bool by_mass = filter == 1;
            if (by_mass ? top_p < 1.0f : top_k > 0 && top_k < vocab_size) {
                cut = shrink(
                    row, cut, histogram, scratch,
                    [&](float x) { return by_mass ? token_mass(x, max, scale) : uint64_t{1}; },
                    [&](uint64_t total) { return by_mass ? top_p_mass(top_p, total) : static_cast<uint64_t>(top_k); });
            }
        }
        cut = cut_min_p(cut, p.min_p[seq], max, temperature, vocab_size);
        const uint64_t random = philox_u64(p.seeds[seq], p.steps[seq]);
        chosen = find_in_order(
            row, scratch,
            [&](int32_t i, float x) {
                return is_kept(cut, ordered_key(x), i) ? token_mass(x, max, scale) : uint64_t{0};
            },
            [&](uint64_t total) { return scale_random(random, total); });
    }
    if (threadIdx.x == 0) {
        const float x = clean_logit(to_float(row.logits[chosen]));
        p.out_ids[seq] = chosen;
        p.out_logprobs[seq] = x > -INFINITY ? (x == max ? 0.0f : x - max) - logf(sum) : -INFINITY;
    }
}

}  // namespace

void sample_cuda(const SampleParams& p, void* stream) {
    if (p.num_seqs == 0) {
        return;
    }
    check(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "sample: vocab_size is ", p.vocab_size,
          ", but the op takes 1 to ", kMaxVocabSize);
    if (sample_in_clusters(p, stream)) {
        return;
    }
    visit_float(p.dtype, [&]<typename T>() {
        const auto run = [&]<int kVec>() {
            // A vector a lane at least; more warps than that have nothing to do.
            const int64_t warps = (p.vocab_size + 32 * kVec - 1) / (32 * kVec);
            const int threads = static_cast<int>(warps < kMaxWarps ? warps * 32 : kMaxThreads);
            launch(sample_kernel<T, kVec>,
                   {.grid = dim3(p.num_seqs), .block = dim3(threads), .shared_bytes = sizeof(Histogram), .pdl = true},
                   stream, p);
        };
        constexpr int kWide = kVecElements<T>;
        if (reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % kWide == 0) {
            run.template operator()<kWide>();
        } else {
            run.template operator()<1>();
        }
    });
}

}  // namespace fastkernels
