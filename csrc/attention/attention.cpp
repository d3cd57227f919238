// out = softmax(mask(soft_cap(scale * q k^T))) v, with one pass over the keys: a running maximum and sum of each
// query row rescale what was summed before (online softmax). Everything is accumulated in fp32.
//
// A "row" is one query of one query head. The rows of a sequence that share a kv head lie in one matrix, row
// r = token * group + head: so a key that was read once serves the whole group. A task owns at most kRows rows of
// one sequence and kv head, and walks over the keys that any of them sees, kKeys at a time. Where all the rows of a
// sequence fit in one task (a decode), its keys are split into chunks of kChunk, each a task with a partial result,
// and a second pass combines them. Tasks depend on the sequence's own shape alone, never on the number of threads
// or on the rest of the batch: so the result does not either.
//
// Moved: K and V once per row block (decode: once). Source: Milakov and Gimelshein 2018; Dao et al. 2022.
#include "fastkernels/attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "common/cpu/math.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"

namespace fastkernels::cpu::FK_ISA {
namespace {

constexpr int kRows = 64;                        // of a task
constexpr int kKeys = 64;                        // of a step of a task
constexpr int kChunk = 256;                      // keys of a split
constexpr int kMaxDim = 256;                     // head_dim
constexpr int kTileRows = kWidth == 16 ? 4 : 2;  // rows that share a load of K or V, as many as registers allow
constexpr int kTileVecs = 4;                     // vectors of an output row held in registers
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Task {
    int64_t seq;
    int32_t kv_head;
    int32_t row_begin, num_rows;
    int32_t key_begin, key_end;
    int64_t partial;  // number of the partial result, -1: the task is the whole context
};

// The partial results of one sequence and kv head, one a chunk.
struct Split {
    int64_t first_partial, num_partials;
    Task task;
};

struct Scratch {
    alignas(64) float q[kRows * kMaxDim];  // scaled
    alignas(64) float sum_pv[kRows * kMaxDim];
    alignas(64) float k[kKeys * kMaxDim];  // widened to fp32, where several row tiles use them
    alignas(64) float v[kKeys * kMaxDim];
    alignas(64) float scores[kRows * kKeys];
    float max[kRows], sum[kRows];
};

// tanh(x) within 3e-7 of itself: the series where 1 - 2 / (e^2x + 1) would cancel.
inline float fast_tanh(float x) {
    const float z = x * x;
    float p = -1382.0f / 155925.0f;
    p = p * z + 62.0f / 2835.0f;
    p = p * z - 17.0f / 315.0f;
    p = p * z + 2.0f / 15.0f;
    p = p * z - 1.0f / 3.0f;
    const float near_zero = x + x * z * p;
    const float elsewhere = 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
    return z < 0.12f ? near_zero : elsewhere;
}

// The keys and the geometry of one sequence.
struct Sequence {
    int64_t first_token;
    int32_t len_q, len_k;
    const char* k;  // contiguous: of key 0
    const char* v;
    const int32_t* pages;  // paged
};

class Attention {
  public:
    explicit Attention(const AttentionParams& p)
        : p_(p),
          group_(p.num_q_heads / p.num_kv_heads),
          padded_dim_((p.head_dim + kWidth - 1) / kWidth * kWidth),
          element_bytes_(static_cast<int64_t>(size_bytes(p.kv_dtype))) {
    }

    void make_tasks();
    template <typename T, typename KV>
    void run(const Task& task) const;
    template <typename T>
    void combine(const Split& split) const;

    std::vector<Task> tasks;
    std::vector<Split> splits;
    int64_t num_partials = 0;
    int64_t work = 0;  // multiply-adds
    float* partials = nullptr;

    int64_t partial_floats() const {
        return static_cast<int64_t>(kRows) * (padded_dim_ + 2);
    }

  private:
    Sequence sequence(int64_t seq) const {
        Sequence s{};
        s.first_token = p_.cu_seqlens_q[seq];
        s.len_q = p_.cu_seqlens_q[seq + 1] - p_.cu_seqlens_q[seq];
        s.k = static_cast<const char*>(p_.k);
        if (p_.page_size > 0) {
            s.len_k = p_.seq_lens[seq];
            s.pages = p_.page_table + seq * p_.page_table_seq_stride;
        } else {
            const int64_t first_key = p_.cu_seqlens_k[seq];
            s.len_k = p_.cu_seqlens_k[seq + 1] - p_.cu_seqlens_k[seq];
            s.k += first_key * p_.k_token_stride * element_bytes_;
            s.v = static_cast<const char*>(p_.v) + first_key * p_.v_token_stride * element_bytes_;
        }
        return s;
    }

    // Whether masks say which of the new tokens a token of the sequence sees.
    bool has_tree(const Sequence& s) const {
        return p_.tree_mask != nullptr && s.len_q <= 64;
    }

    // The keys [first, second) that a row sees; of those of new tokens its mask may hide some.
    std::pair<int32_t, int32_t> visible(const Sequence& s, int32_t row) const {
        int32_t end = s.len_k;
        if (has_tree(s)) {
            return {0, end};
        }
        int32_t begin = 0;
        if (p_.causal || p_.window > 0) {
            const int32_t self = s.len_k - s.len_q + row / group_;
            end = p_.causal ? std::clamp(self + 1, 0, s.len_k) : s.len_k;
            begin = p_.window > 0 ? std::max(self + 1 - p_.window, 0) : 0;
        }
        return {std::min(begin, end), end};
    }

    template <typename KV>
    void key_rows(const Sequence& s, int32_t kv_head, int32_t begin, int32_t count, const KV** k, const KV** v) const;
    template <typename T>
    void store_row(const Sequence& s, const Task& task, int32_t row, const float* x, float scale) const;

    const AttentionParams& p_;
    const int32_t group_, padded_dim_;
    const int64_t element_bytes_;
};

void Attention::make_tasks() {
    for (int64_t seq = 0; seq < p_.num_seqs; ++seq) {
        const Sequence s = sequence(seq);
        const int64_t all_rows = static_cast<int64_t>(s.len_q) * group_;
        if (s.len_q <= 0 || (s.len_k <= 0 && p_.page_size > 0)) {
            continue;
        }
        for (int32_t head = 0; head < p_.num_kv_heads; ++head) {
            // The last rows see the most keys: they go first, so that no thread is left with the longest at the end.
            for (int64_t block = (all_rows - 1) / kRows; block >= 0; --block) {
                Task task{};
                task.seq = seq;
                task.kv_head = head;
                task.row_begin = static_cast<int32_t>(block * kRows);
                task.num_rows = static_cast<int32_t>(std::min<int64_t>(kRows, all_rows - task.row_begin));
                task.key_begin = visible(s, task.row_begin).first;
                task.key_end = visible(s, task.row_begin + task.num_rows - 1).second;
                task.partial = -1;
                const int32_t num_keys = std::max(task.key_end - task.key_begin, 0);
                work += static_cast<int64_t>(task.num_rows) * num_keys * 2 * padded_dim_;
                if (all_rows > kRows || num_keys <= kChunk) {
                    tasks.push_back(task);
                    continue;
                }
                const int32_t end = task.key_end;
                splits.push_back({num_partials, 0, task});
                while (task.key_begin < end) {  // cut at multiples of kChunk, wherever a window begins
                    task.key_end = std::min(end, (task.key_begin / kChunk + 1) * kChunk);
                    task.partial = num_partials++;
                    tasks.push_back(task);
                    task.key_begin = task.key_end;
                }
                splits.back().num_partials = num_partials - splits.back().first_partial;
            }
        }
    }
}

template <typename KV>
void Attention::key_rows(const Sequence& s, int32_t kv_head, int32_t begin, int32_t count, const KV** k,
                         const KV** v) const {
    if (p_.page_size == 0) {
        const KV* first_k = reinterpret_cast<const KV*>(s.k) + kv_head * p_.k_head_stride;
        const KV* first_v = reinterpret_cast<const KV*>(s.v) + kv_head * p_.v_head_stride;
        for (int32_t j = 0; j < count; ++j) {
            k[j] = first_k + static_cast<int64_t>(begin + j) * p_.k_token_stride;
            v[j] = first_v + static_cast<int64_t>(begin + j) * p_.v_token_stride;
        }
    } else {
        const KV* cache = reinterpret_cast<const KV*>(s.k);
        const int64_t page_elements = static_cast<int64_t>(p_.page_size) * p_.head_dim;  // of one head
        for (int32_t j = 0; j < count; ++j) {
            const int32_t key = begin + j;
            const int64_t page = s.pages[key / p_.page_size * p_.page_table_page_stride];
            k[j] = cache + (page * 2 * p_.num_kv_heads + kv_head) * page_elements +
                   static_cast<int64_t>(key % p_.page_size) * p_.head_dim;
            v[j] = k[j] + p_.num_kv_heads * page_elements;
        }
    }
    for (int32_t j = count; j < kKeys; ++j) {  // masked later, but read: not past the sequence, where NaN may lie
        k[j] = k[count - 1];
        v[j] = v[count - 1];
    }
}

template <typename T>
void widen(const T* x, int32_t dim, int32_t padded_dim, float* out, float scale = 1.0f) {
#pragma omp simd
    for (int32_t i = 0; i < dim; ++i) {
        out[i] = to_float(x[i]) * scale;
    }
    for (int32_t i = dim; i < padded_dim; ++i) {
        out[i] = 0.0f;
    }
}

// scores[r][j] = q[r] . k[j]: R rows by kWidth / R keys at a time, so that the sums of all pairs fill one vector.
template <int R, typename KV>
void multiply_qk(const float* q, const KV* const* k, int32_t padded_dim, int32_t num_keys, float* scores) {
    constexpr int C = kWidth / R;
    for (int32_t j = 0; j < num_keys; j += C) {
        Vec sums[kWidth] = {};
        for (int32_t d = 0; d < padded_dim; d += kWidth) {
            Vec rows[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                rows[r] = load(q + r * padded_dim + d);
            }
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                const Vec key = load(k[j + c] + d);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    sums[r * C + c] += rows[r] * key;
                }
            }
        }
        const Vec all = sum_each(sums);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            std::memcpy(scores + r * kKeys + j, reinterpret_cast<const float*>(&all) + r * C, C * sizeof(float));
        }
    }
}

// out[r] = out[r] * rescale[r] + sum_j p[r][j] v[j]
template <int R, int N, typename KV>
void multiply_pv_part(const float* p, const KV* const* v, int32_t d, int32_t padded_dim, int32_t num_keys,
                      const float* rescale, float* out) {
    Vec sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            sums[r][n] = load(out + r * padded_dim + d + n * kWidth) * rescale[r];
        }
    }
    for (int32_t j = 0; j < num_keys; ++j) {
        Vec values[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            values[n] = load(v[j] + d + n * kWidth);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                sums[r][n] += p[r * kKeys + j] * values[n];
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            store(out + r * padded_dim + d + n * kWidth, sums[r][n]);
        }
    }
}

template <int R, typename KV>
void multiply_pv(const float* p, const KV* const* v, int32_t padded_dim, int32_t num_keys, const float* rescale,
                 float* out) {
    int32_t d = 0;
    for (; d + kTileVecs * kWidth <= padded_dim; d += kTileVecs * kWidth) {
        multiply_pv_part<R, kTileVecs>(p, v, d, padded_dim, num_keys, rescale, out);
    }
    for (; d < padded_dim; d += kWidth) {
        multiply_pv_part<R, 1>(p, v, d, padded_dim, num_keys, rescale, out);
    }
}

// body.operator()<R>(row) over tiles of R rows.
template <typename Body>
void for_row_tiles(int32_t num_rows, const Body& body) {
    int32_t row = 0;
    for (; row + kTileRows <= num_rows; row += kTileRows) {
        body.template operator()<kTileRows>(row);
    }
    if (kTileRows > 2 && row + 2 <= num_rows) {
        body.template operator()<2>(row);
        row += 2;
    }
    if (row < num_rows) {
        body.template operator()<1>(row);
    }
}

// Turns the scores of one row into exp(score - max) and brings the row's running max and sum up to date; returns
// the factor that what was summed before is worth now.
float softmax_row(float* scores, float& max, float& sum) {
    float block_max = kNone;
#pragma omp simd reduction(max : block_max)
    for (int j = 0; j < kKeys; ++j) {
        block_max = scores[j] > block_max ? scores[j] : block_max;
    }
    const float new_max = std::max(max, block_max);
    const float base = new_max == kNone ? 0.0f : new_max;  // a row that has seen no key yet
    float block_sum = 0.0f;
#pragma omp simd reduction(+ : block_sum)
    for (int j = 0; j < kKeys; ++j) {
        scores[j] = fast_exp(scores[j] - base);
        block_sum += scores[j];
    }
    const float rescale = fast_exp(max - base);
    sum = sum * rescale + block_sum;
    max = new_max;
    return rescale;
}

template <typename T>
void Attention::store_row(const Sequence& s, const Task& task, int32_t row, const float* x, float scale) const {
    const int32_t token = (task.row_begin + row) / group_;
    const int32_t head = task.kv_head * group_ + (task.row_begin + row) % group_;
    T* out = static_cast<T*>(p_.out) + (s.first_token + token) * p_.out_token_stride + head * p_.out_head_stride;
#pragma omp simd
    for (int32_t i = 0; i < p_.head_dim; ++i) {
        out[i] = from_float<T>(x[i] * scale);
    }
}

template <typename T, typename KV>
void Attention::run(const Task& task) const {
    Scratch x;
    const Sequence s = sequence(task.seq);
    const int32_t num_rows = task.num_rows;

    for (int32_t r = 0; r < num_rows; ++r) {
        const int32_t token = (task.row_begin + r) / group_;
        const int32_t head = task.kv_head * group_ + (task.row_begin + r) % group_;
        const int64_t offset = (s.first_token + token) * p_.q_token_stride + head * p_.q_head_stride;
        float* wide = x.q + r * padded_dim_;
        if (p_.q_dtype == DType::e4m3) {
            const float q_scale = p_.q_scale != nullptr ? p_.q_scale[task.kv_head] : 1.0f;
            widen(static_cast<const e4m3*>(p_.q) + offset, p_.head_dim, padded_dim_, wide, p_.scale * q_scale);
        } else {
            widen(static_cast<const T*>(p_.q) + offset, p_.head_dim, padded_dim_, wide, p_.scale);
        }
        x.max[r] = kNone;
        x.sum[r] = 0.0f;
    }
    std::fill_n(x.sum_pv, num_rows * padded_dim_, 0.0f);

    constexpr bool kBytes = sizeof(KV) == 1;  // multiplied by the scales of their head
    const bool widened = kBytes || padded_dim_ != p_.head_dim || (num_rows > kTileRows && sizeof(T) < sizeof(float));
    const float k_scale = kBytes && p_.k_scale != nullptr ? p_.k_scale[task.kv_head] : 1.0f;
    const float v_scale = kBytes && p_.v_scale != nullptr ? p_.v_scale[task.kv_head] : 1.0f;
    const float* k_wide[kKeys];
    const float* v_wide[kKeys];
    for (int j = 0; j < kKeys; ++j) {
        k_wide[j] = x.k + j * padded_dim_;
        v_wide[j] = x.v + j * padded_dim_;
    }

    const KV* k[kKeys];
    const KV* v[kKeys];
    for (int32_t begin = task.key_begin; begin < task.key_end; begin += kKeys) {
        const int32_t count = std::min(kKeys, task.key_end - begin);
        const int32_t padded_count = (count + kWidth - 1) / kWidth * kWidth;
        key_rows(s, task.kv_head, begin, count, k, v);
        if (widened) {
            for (int32_t j = 0; j < padded_count; ++j) {
                widen(k[j], p_.head_dim, padded_dim_, x.k + j * padded_dim_, k_scale);
                widen(v[j], p_.head_dim, padded_dim_, x.v + j * padded_dim_, v_scale);
            }
        }

        // scores
        for_row_tiles(num_rows, [&]<int R>(int32_t row) {
            const float* q = x.q + row * padded_dim_;
            float* scores = x.scores + row * kKeys;
            if constexpr (!kBytes) {
                if (!widened) {
                    return multiply_qk<R>(q, k, padded_dim_, padded_count, scores);
                }
            }
            multiply_qk<R>(q, k_wide, padded_dim_, padded_count, scores);
        });

        // soft cap, mask, softmax
        float rescale[kRows];
        for (int32_t r = 0; r < num_rows; ++r) {
            float* scores = x.scores + r * kKeys;
            if (p_.soft_cap > 0.0f) {
                const float inverse = 1.0f / p_.soft_cap;
#pragma omp simd
                for (int32_t j = 0; j < padded_count; ++j) {
                    scores[j] = p_.soft_cap * fast_tanh(scores[j] * inverse);
                }
            }
            const auto [first, last] = visible(s, task.row_begin + r);
            std::fill(scores, scores + std::clamp(first - begin, 0, kKeys), kNone);
            std::fill(scores + std::clamp(last - begin, 0, count), scores + kKeys, kNone);
            if (has_tree(s) && begin + count > s.len_k - s.len_q) {
                const int32_t first_new = s.len_k - s.len_q, token = (task.row_begin + r) / group_;
                const auto mask = static_cast<uint64_t>(p_.tree_mask[s.first_token + token]);
                for (int32_t j = std::max(0, first_new - begin); j < count; ++j) {
                    scores[j] = mask >> (begin + j - first_new) & 1 ? scores[j] : kNone;
                }
            }
            rescale[r] = softmax_row(scores, x.max[r], x.sum[r]);
        }

        // values
        for_row_tiles(num_rows, [&]<int R>(int32_t row) {
            const float* scores = x.scores + row * kKeys;
            float* out = x.sum_pv + row * padded_dim_;
            if constexpr (!kBytes) {
                if (!widened) {
                    return multiply_pv<R>(scores, v, padded_dim_, count, rescale + row, out);
                }
            }
            multiply_pv<R>(scores, v_wide, padded_dim_, count, rescale + row, out);
        });
    }

    if (task.partial < 0) {
        for (int32_t r = 0; r < num_rows; ++r) {  // a row that sees no key gives zeros
            store_row<T>(s, task, r, x.sum_pv + r * padded_dim_, x.sum[r] > 0.0f ? 1.0f / x.sum[r] : x.sum[r]);
        }
    } else {
        float* partial = partials + task.partial * partial_floats();
        std::copy_n(x.sum_pv, num_rows * padded_dim_, partial);
        std::copy_n(x.max, num_rows, partial + kRows * padded_dim_);
        std::copy_n(x.sum, num_rows, partial + kRows * padded_dim_ + kRows);
    }
}

template <typename T>
void Attention::combine(const Split& split) const {
    const Sequence s = sequence(split.task.seq);
    alignas(64) float total[kMaxDim];
    for (int32_t r = 0; r < split.task.num_rows; ++r) {
        const float* first = partials + split.first_partial * partial_floats();
        float max = kNone;
        for (int64_t i = 0; i < split.num_partials; ++i) {
            max = std::max(max, first[i * partial_floats() + kRows * padded_dim_ + r]);
        }
        const float base = max == kNone ? 0.0f : max;
        float sum = 0.0f;
        std::fill_n(total, padded_dim_, 0.0f);
        for (int64_t i = 0; i < split.num_partials; ++i) {
            const float* partial = first + i * partial_floats();
            const float* sum_pv = partial + r * padded_dim_;
            const float weight = fast_exp(partial[kRows * padded_dim_ + r] - base);
            sum += weight * partial[kRows * padded_dim_ + kRows + r];
#pragma omp simd
            for (int32_t d = 0; d < padded_dim_; ++d) {
                total[d] += weight * sum_pv[d];
            }
        }
        store_row<T>(s, split.task, r, total, sum > 0.0f ? 1.0f / sum : sum);
    }
}

// body(i) for every i in [0, count), each taken by the next free thread.
template <typename Body>
void share(int64_t count, bool serial, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel_for(count, serial ? count : 1, [&](int64_t) {
        for (int64_t i = next++; i < count; i = next++) {
            body(i);
        }
    });
}

}  // namespace

void attention_cpu(const AttentionParams& p) {
    check(p.head_dim > 0 && p.head_dim <= kMaxDim, "attention: head_dim ", p.head_dim, " is not supported: 1 to ",
          kMaxDim, " are");
    check(p.num_kv_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, "attention: num_q_heads (", p.num_q_heads,
          ") must be a multiple of num_kv_heads (", p.num_kv_heads, ")");
    Attention attention(p);
    attention.make_tasks();
    if (attention.tasks.empty()) {
        return;
    }
    std::unique_ptr<float[]> partials;
    if (attention.num_partials > 0) {
        partials.reset(new float[static_cast<size_t>(attention.num_partials * attention.partial_floats())]);
        attention.partials = partials.get();
    }
    const bool serial = attention.work < 200'000;  // about 10 us: less than threads would save
    visit_float(p.dtype, [&]<typename T>() {
        const auto run_all = [&]<typename KV>() {
            share(static_cast<int64_t>(attention.tasks.size()), serial,
                  [&](int64_t i) { attention.run<T, KV>(attention.tasks[static_cast<size_t>(i)]); });
        };
        if (p.kv_dtype == p.dtype) {
            run_all.template operator()<T>();
        } else {
            visit_byte(p.kv_dtype, run_all);
        }
        share(static_cast<int64_t>(attention.splits.size()), serial,
              [&](int64_t i) { attention.combine<T>(attention.splits[static_cast<size_t>(i)]); });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(attention_cpu, AttentionParams)
