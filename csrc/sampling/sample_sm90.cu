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
//             top-p; each block adds up its part of the bins of all blocks for all of them, and every block finds the
//             bin at the edge
//   gather    what is above the edge and in its bin, when that is at most kListMax tokens: the row is finished among
//             them. Otherwise the tokens of the bin alone, which give the exact cut; a bin with more than kListMax
//             tokens is split 11 bits of (key, ~id) at a time until it fits.
//   draw      the kept mass of each chunk; the block that owns the drawn one finds the token
//
// Bytes: vocab_size * sizeof(T) a row, once.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "sampling/cluster_row.cuh"
#include "sampling/sample_sm90.h"

namespace fastkernels {
namespace sampling {

constexpr int kMaxCluster = 8;  // what every GPU with clusters takes
constexpr int kDigitBits = 11;
#if __CUDA_ARCH__ >= 900
constexpr int kBlocksPerSm = 2;
#else
constexpr int kBlocksPerSm = 1;  // it compiles, but is not launched
#endif
constexpr float kManyTokens = 16 * kListMax;

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

// Filters and draw among the tokens of s.merged, which hold all that the filters keep; every block does it, block 0
// writes. need: the mass that top-p wants where top-k does not come before it, else 0.
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
    if (cluster_rank() == 0 && before <= target && target < before + own) {  // one thread
        write_result<T>(p, seq, id_of(rank), x, s);
    }
}

// Of the tokens of s.merged, one bin's, the last that is needed to reach `rest`, into s.cut.
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
        s.cut = {key_of(rank), id_of(rank)};
    }
    __syncthreads();
}

// One filter: the cut within `cut` whose amounts, summed by falling rank, reach top_k or top-p's mass. True when the
// row was finished on the way. All blocks of a row come to the same decisions.
template <typename T>
__device__ __forceinline__ bool shrink(const SampleParams& p, int64_t seq, const Row<T>& row, const Settings& settings,
                                       bool by_mass, Shared& s, Cut& cut) {
    constexpr int kVec = kVecElements<T>;
    const int warp = threadIdx.x / 32;
    const bool cuts = cut.key != 0;
    const auto in_cut = [&](int32_t id, float x) { return !cuts || is_kept(cut, ordered_key(x), id); };
    const auto mass = [&](float x) { return token_mass(x, settings.max, settings.scale); };

    // Histogram of distances.
    clear_bins(s);
    for (int chunk = warp; chunk < row.chunks; chunk += kWarps) {
        const auto bin_of = [&](float x) {
            const float distance = distance_of(x, settings.max, settings.scale);
            return distance < kNoMass ? static_cast<int>(distance) : -1;
        };
        if (cuts) {
            for_some(
                row, chunk, [&](int32_t id, float x) { return bin_of(x) >= 0 && in_cut(id, x); },
                [&](int32_t, float x) { add_to_bins<1>(s, {bin_of(x)}, {by_mass ? mass(x) : uint64_t{1}}); });
        } else if (by_mass) {
            for_vectors<1>(row, chunk, [&](int, int, const float (&x)[kVec]) {
                int bins[kVec];
                uint64_t masses[kVec];
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    bins[i] = bin_of(x[i]);
                    masses[i] = mass(x[i]);
                }
                add_to_bins(s, bins, masses);
            });
        } else {
            for_vectors<2>(row, chunk, [&](int, int, const float (&x)[kVec]) {
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    const int bin = bin_of(x[i]);
                    if (bin >= 0) {
                        atomicAdd(&s.low[bin], 1u);
                    }
                }
            });
        }
    }
    sum_blocks(s);
    find_bin(s, true, [&](uint64_t total) {
        return by_mass ? top_p_mass(settings.top_p, total) : static_cast<uint64_t>(settings.top_k);
    });
    if (s.bin < 0) {
        return false;
    }
    const float near = static_cast<float>(s.bin), far = near + 1.0f;  // distances of the bin at the edge
    const uint64_t wanted = s.wanted;
    uint64_t rest = wanted - s.above;  // of that bin
    // No token up to that bin has less than the mass at its far end.
    const float most_tokens =
        static_cast<float>(s.above + s.in_bin) * (by_mass ? exp2f(far / kBinsPerOctave - 40.0f) : 1.0f);
    bool all = most_tokens <= (by_mass ? kManyTokens : static_cast<float>(kListMax));

    uint64_t prefix = 0, prefix_mask = 0;  // of the ranks in the bin that are still looked at
    const auto at_edge = [&](int32_t id, float x) {
        const float distance = distance_of(x, settings.max, settings.scale);
        return distance < far && distance < kNoMass && (all || distance >= near) && in_cut(id, x) &&
               (rank_of(ordered_key(x), id) & prefix_mask) == prefix;
    };
    for (int shift = 64;;) {
        // Gather what is above the edge and in its bin, or in its bin alone.
        if (threadIdx.x == 0) {
            s.list_size = 0;
        }
        __syncthreads();
        for (int chunk = warp; chunk < row.chunks; chunk += kWarps) {
            for_some(row, chunk, at_edge, [&](int32_t id, float x) {
                const uint32_t at = atomicAdd(&s.list_size, 1u);
                if (at < kListMax) {
                    s.list[at] = rank_of(ordered_key(x), id);
                }
            });
        }
        const int size = merge_lists(s);
        if (size >= 0 && all) {
            finish_in_list<T>(p, seq, settings, size, by_mass ? wanted : 0, s);
            return true;
        }
        if (size >= 0) {
            find_cut(settings, size, rest, by_mass, s);
            cut = s.cut;
            return false;
        }
        cluster_sync();  // the others have merged the lists
        if (all) {
            all = false;
            continue;
        }
        // Split the bin: a histogram of the next 11 bits of the rank, largest in bin 0.
        shift = shift > kDigitBits ? shift - kDigitBits : 0;
        clear_bins(s);
        for (int chunk = warp; chunk < row.chunks; chunk += kWarps) {
            for_some(row, chunk, at_edge, [&](int32_t id, float x) {
                const int digit = static_cast<int>(rank_of(ordered_key(x), id) >> shift & (kBins - 1));
                add_to_bins<1>(s, {kBins - 1 - digit}, {by_mass ? mass(x) : uint64_t{1}});
            });
        }
        sum_blocks(s);
        find_bin(s, false, [&](uint64_t) { return rest; });
        prefix_mask = ~uint64_t{0} << shift;
        prefix = (prefix & ~(static_cast<uint64_t>(kBins - 1) << shift)) | static_cast<uint64_t>(kBins - 1 - s.bin)
                                                                               << shift;
        rest -= s.above;
    }
}

// The token at which the kept mass, summed by id, passes the random number; by the block that owns it.
template <typename T>
__device__ __forceinline__ void draw(const SampleParams& p, int64_t seq, const Row<T>& row, const Settings& settings,
                                     const Cut& cut, Shared& s) {
    constexpr int kVec = kVecElements<T>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto kept_mass = [&](int32_t id, float x) {
        return is_kept(cut, ordered_key(clean_logit(x)), id) ? token_mass(x, settings.max, settings.scale)
                                                             : uint64_t{0};
    };
    for (int chunk = warp; chunk < row.chunks; chunk += kWarps) {
        uint64_t mass = 0;
        if (cut.key == 0) {
            for_vectors<1>(row, chunk, [&](int, int, const float (&x)[kVec]) {
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    mass += token_mass(x[i], settings.max, settings.scale);
                }
            });
        } else {
            for_some(
                row, chunk, [&](int32_t id, float x) { return is_kept(cut, ordered_key(clean_logit(x)), id); },
                [&](int32_t, float x) { mass += token_mass(clean_logit(x), settings.max, settings.scale); });
        }
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
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
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
            for_some(
                row, chunk, [&](int32_t, float x) { return clean_logit(x) == max; },
                [&](int32_t id, float) { lowest = id < lowest ? id : lowest; });
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

}  // namespace sampling

bool sample_in_clusters(const SampleParams& p, void* stream) {
    if (compute_capability() < 90 || reinterpret_cast<uintptr_t>(p.logits) % 16 != 0) {
        return false;
    }
    using namespace sampling;
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
        launch(sample_cluster_kernel<T>,
               {.grid = dim3(static_cast<unsigned>(p.num_seqs * cluster)),
                .block = dim3(kThreads),
                .shared_bytes = shared_bytes,
                .pdl = true,
                .cluster = static_cast<unsigned>(cluster)},
               stream, p, static_cast<int>(chunks), static_cast<int>(chunks_per_block()));
        fits = true;
    });
    return fits;
}

}  // namespace fastkernels
