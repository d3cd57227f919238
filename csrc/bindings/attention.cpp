#include "fastkernels/attention.h"

#include <limits>
#include <optional>

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

// What both ops have in common: q, out and the numbers.
AttentionParams common_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                              const Tensor& work_map, Tensor& workspace, double scale, int64_t window, double soft_cap,
                              Tensor& y) {
    check(q.dim() == 3 && y.dim() == 3, op, ": q and out must have 3 dimensions");
    check(y.size(0) == q.size(0) && y.size(1) == q.size(1) && y.size(2) == q.size(2), op, ": out does not fit q");
    check(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1 &&
              cu_seqlens_q.scalar_type() == torch::headeronly::ScalarType::Int,
          op, ": cu_seqlens_q must be int32 [num_seqs + 1]");
    check(window >= 0 && window <= std::numeric_limits<int32_t>::max(), op, ": window must be a number of tokens");
    AttentionParams p{};
    p.q = in(q);
    p.k = in(k);
    p.out = out(y);
    p.cu_seqlens_q = static_cast<const int32_t*>(in(cu_seqlens_q));
    p.work_map = static_cast<const int32_t*>(in(work_map));
    p.workspace = static_cast<float*>(out(workspace));
    p.num_tokens = q.size(0);
    p.num_keys = k.size(0);
    p.num_seqs = cu_seqlens_q.size(0) - 1;
    p.q_token_stride = q.stride(0);
    p.q_head_stride = q.stride(1);
    p.out_token_stride = y.stride(0);
    p.out_head_stride = y.stride(1);
    p.num_q_heads = static_cast<int32_t>(q.size(1));
    p.head_dim = static_cast<int32_t>(q.size(2));
    p.scale = static_cast<float>(scale);
    p.soft_cap = static_cast<float>(soft_cap);
    p.window = static_cast<int32_t>(window);
    p.dtype = dtype_of(y, "out");
    p.q_dtype = dtype_of(q, "q");
    p.kv_dtype = dtype_of(k, "k");
    if (p.q_dtype == DType::e4m3) {
        check(p.kv_dtype == DType::e4m3 && (p.dtype == DType::bf16 || p.dtype == DType::f16), op,
              ": q in e4m3 takes keys and values in e4m3 and out in bf16 or fp16");
    } else {
        check(p.q_dtype == p.dtype, op, ": out must have the dtype of q");
    }
    return p;
}

// Lengths that the CPU can read are checked there always: a wrong one would read past the memory.
void check_cumulative(const char* op, const char* name, const int32_t* lengths, int64_t num_seqs, int64_t limit) {
    check(lengths[0] >= 0, op, ": ", name, " must not be negative");
    for (int64_t i = 0; i < num_seqs; ++i) {
        check(lengths[i] <= lengths[i + 1], op, ": ", name, " must not decrease, but falls after sequence ", i);
    }
    check(lengths[num_seqs] <= limit, op, ": ", name, " ends at ", lengths[num_seqs], ", but there are ", limit,
          " rows");
}

void check_pages(const AttentionParams& p, int64_t num_pages, int64_t max_pages) {
    for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
        if (p.cu_seqlens_q[seq] == p.cu_seqlens_q[seq + 1]) {
            continue;
        }
        const int64_t used = (static_cast<int64_t>(p.seq_lens[seq]) + p.page_size - 1) / p.page_size;
        check(used <= max_pages, "paged_attention: sequence ", seq, " has ", p.seq_lens[seq],
              " tokens, but its row of the page table holds ", max_pages * p.page_size);
        // Pages before the window are not read, and may have been given back.
        int64_t first = 0;
        if (p.window > 0) {
            const int64_t num_queries = p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq];
            first = (p.seq_lens[seq] - num_queries + 1 - p.window) / p.page_size;
        }
        for (int64_t i = first > 0 ? first : 0; i < used; ++i) {
            const int64_t page = p.page_table[seq * p.page_table_seq_stride + i * p.page_table_page_stride];
            check(page >= 0 && page < num_pages, "paged_attention: sequence ", seq, " names page ", page,
                  ", but the cache has pages 0 to ", num_pages - 1);
        }
    }
}

void attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor work_map,
               Tensor workspace, double scale, bool causal, int64_t window, double soft_cap, Tensor y,
               std::optional<Tensor> q_scale, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
    check(k.dim() == 3 && v.dim() == 3 && k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
              k.size(2) == q.size(2),
          "attention: k and v must be [num_keys, num_kv_heads, head_dim]");
    check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
          "attention: q, keys and values must share a dtype");
    AttentionParams p = common_params("attention", q, k, cu_seqlens_q, work_map, workspace, scale, window, soft_cap, y);
    check(cu_seqlens_k.dim() == 1 && cu_seqlens_k.size(0) == cu_seqlens_q.size(0) &&
              cu_seqlens_k.scalar_type() == cu_seqlens_q.scalar_type(),
          "attention: cu_seqlens_k must be int32 [num_seqs + 1]");
    p.v = in(v);
    p.cu_seqlens_k = static_cast<const int32_t*>(in(cu_seqlens_k));
    p.k_token_stride = k.stride(0);
    p.k_head_stride = k.stride(1);
    p.v_token_stride = v.stride(0);
    p.v_head_stride = v.stride(1);
    p.num_kv_heads = static_cast<int32_t>(k.size(1));
    p.q_scale = scales_of("attention", "q_scale", q_scale, p.num_kv_heads);
    p.k_scale = scales_of("attention", "k_scale", k_scale, p.num_kv_heads);
    p.v_scale = scales_of("attention", "v_scale", v_scale, p.num_kv_heads);
    p.causal = causal;
    if (!q.is_cuda()) {
        check_cumulative("attention", "cu_seqlens_q", p.cu_seqlens_q, p.num_seqs, p.num_tokens);
        check_cumulative("attention", "cu_seqlens_k", p.cu_seqlens_k, p.num_seqs, k.size(0));
    }
    FK_LAUNCH(attention, q, p);
}

void paged_attention(Tensor q, Tensor kv_cache, Tensor page_table, Tensor seq_lens, Tensor cu_seqlens_q,
                     Tensor work_map, Tensor workspace, double scale, int64_t window, double soft_cap, Tensor y,
                     std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, std::optional<Tensor> tree_mask,
                     std::optional<Tensor> q_scale, int64_t max_query_len) {
    check(kv_cache.dim() == 5 && kv_cache.size(1) == 2 && kv_cache.size(4) == q.size(2),
          "paged_attention: kv_cache must be [num_pages, 2, num_kv_heads, page_size, head_dim]");
    AttentionParams p =
        common_params("paged_attention", q, kv_cache, cu_seqlens_q, work_map, workspace, scale, window, soft_cap, y);
    check(page_table.dim() == 2 && page_table.size(0) == p.num_seqs && seq_lens.dim() == 1 &&
              seq_lens.size(0) == p.num_seqs && page_table.scalar_type() == cu_seqlens_q.scalar_type() &&
              seq_lens.scalar_type() == cu_seqlens_q.scalar_type(),
          "paged_attention: page_table must be int32 [num_seqs, max_pages], seq_lens int32 [num_seqs]");
    p.seq_lens = static_cast<const int32_t*>(in(seq_lens));
    p.page_table = static_cast<const int32_t*>(in(page_table));
    p.page_table_seq_stride = page_table.stride(0);
    p.page_table_page_stride = page_table.stride(1);
    p.num_kv_heads = static_cast<int32_t>(kv_cache.size(2));
    p.page_size = static_cast<int32_t>(kv_cache.size(3));
    p.q_scale = scales_of("paged_attention", "q_scale", q_scale, p.num_kv_heads);
    check(p.kv_dtype == p.dtype || size_bytes(p.kv_dtype) == 1,
          "paged_attention: kv_cache must have the dtype of q, or e4m3, e5m2 or int8");
    p.k_scale = scales_of("paged_attention", "k_scale", k_scale, p.num_kv_heads);
    p.v_scale = scales_of("paged_attention", "v_scale", v_scale, p.num_kv_heads);
    if (tree_mask) {
        check(tree_mask->dim() == 1 && tree_mask->size(0) == q.size(0) && tree_mask->is_contiguous() &&
                  tree_mask->scalar_type() == torch::headeronly::ScalarType::Long,
              "paged_attention: tree_mask must be contiguous int64 [num_tokens]");
        p.tree_mask = static_cast<const int64_t*>(in(*tree_mask));
    }
    p.max_pages = page_table.size(1);
    p.max_query_len = max_query_len;
    p.causal = true;
    if (!q.is_cuda()) {
        check_cumulative("paged_attention", "cu_seqlens_q", p.cu_seqlens_q, p.num_seqs, p.num_tokens);
        for (int64_t seq = 0; max_query_len > 0 && seq < p.num_seqs; ++seq) {
            const int64_t queries = p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq];
            check(queries <= max_query_len, "paged_attention: a sequence has ", queries,
                  " queries, but max_query_len is ", max_query_len);
        }
        check_pages(p, kv_cache.size(0), page_table.size(1));
    }
    FK_LAUNCH(attention, q, p);
}

void attention_plan_cpu(const AttentionPlanParams&) {
}  // the CPU kernel needs no map

void attention_plan(Tensor cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seq_lens,
                    int64_t num_tokens, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window,
                    bool causal, torch::headeronly::ScalarType dtype, Tensor work_map) {
    check(cu_seqlens_k.has_value() != seq_lens.has_value(), "attention_plan: give either cu_seqlens_k or seq_lens");
    AttentionPlanParams p{};
    p.cu_seqlens_q = static_cast<const int32_t*>(in(cu_seqlens_q));
    p.cu_seqlens_k = cu_seqlens_k ? static_cast<const int32_t*>(in(*cu_seqlens_k)) : nullptr;
    p.seq_lens = seq_lens ? static_cast<const int32_t*>(in(*seq_lens)) : nullptr;
    p.work_map = static_cast<int32_t*>(out(work_map));
    p.num_tokens = num_tokens;
    p.num_seqs = cu_seqlens_q.size(0) - 1;
    p.num_q_heads = static_cast<int32_t>(num_q_heads);
    p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
    p.head_dim = static_cast<int32_t>(head_dim);
    p.window = static_cast<int32_t>(window);
    p.causal = causal;
    using torch::headeronly::ScalarType;
    p.dtype = dtype == ScalarType::Float ? DType::f32 : dtype == ScalarType::Half ? DType::f16 : DType::bf16;
    FK_LAUNCH(attention_plan, cu_seqlens_q, p);
}

void register_attention(torch::stable::detail::StableLibrary& m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("paged_attention", TORCH_BOX(&paged_attention));
    m.impl("attention_plan", TORCH_BOX(&attention_plan));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor work_map, "
        "Tensor(a!) workspace, float scale, bool causal, int window, float soft_cap, Tensor(b!) out, "
        "Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
    m.def(
        "paged_attention(Tensor q, Tensor kv_cache, Tensor page_table, Tensor seq_lens, Tensor cu_seqlens_q, "
        "Tensor work_map, Tensor(a!) workspace, float scale, int window, float soft_cap, Tensor(b!) out, "
        "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? tree_mask=None, Tensor? q_scale=None, "
        "int max_query_len=0) -> ()");
    m.def(
        "attention_plan(Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seq_lens, int num_tokens, "
        "int num_q_heads, int num_kv_heads, int head_dim, int window, bool causal, ScalarType dtype, "
        "Tensor(a!) work_map) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_attention)
