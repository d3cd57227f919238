#include "fastkernels/sampling.h"

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
const T* vector_in(const Tensor& x, ScalarType dtype, int64_t size, const char* op, const char* name) {
    check(x.dim() == 1 && x.numel() == size && x.scalar_type() == dtype && (size < 2 || x.stride(0) == 1), op, ": ",
          name, " must be a contiguous vector with an element a row, of the op's dtype");
    return static_cast<const T*>(in(x));
}

void sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor steps,
            Tensor out_ids, Tensor out_logprobs) {
    check(logits.dim() == 2 && (logits.size(1) < 2 || logits.stride(1) == 1),
          "sample: logits must be [num_seqs, vocab_size] with a contiguous last dimension");
    const int64_t n = logits.size(0);
    SampleParams p{};
    p.logits = in(logits);
    p.temperature = vector_in<float>(temperature, ScalarType::Float, n, "sample", "temperature");
    p.top_k = vector_in<int32_t>(top_k, ScalarType::Int, n, "sample", "top_k");
    p.top_p = vector_in<float>(top_p, ScalarType::Float, n, "sample", "top_p");
    p.min_p = vector_in<float>(min_p, ScalarType::Float, n, "sample", "min_p");
    p.seeds = vector_in<int64_t>(seeds, ScalarType::Long, n, "sample", "seeds");
    p.steps = vector_in<int32_t>(steps, ScalarType::Int, n, "sample", "steps");
    vector_in<int32_t>(out_ids, ScalarType::Int, n, "sample", "out_ids");
    vector_in<float>(out_logprobs, ScalarType::Float, n, "sample", "out_logprobs");
    p.out_ids = static_cast<int32_t*>(out(out_ids));
    p.out_logprobs = static_cast<float*>(out(out_logprobs));
    p.num_seqs = n;
    p.vocab_size = logits.size(1);
    p.logits_stride = logits.stride(0);
    p.dtype = dtype_of(logits, "logits");
    check(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "sample: vocab_size is ", p.vocab_size,
          ", but the op takes 1 to ", kMaxVocabSize);
    FK_LAUNCH(sample, logits, p);
}

void penalize(Tensor logits, Tensor token_counts, Tensor slots, Tensor repetition, Tensor presence, Tensor frequency) {
    check(logits.dim() == 2 && (logits.size(1) < 2 || logits.stride(1) == 1),
          "penalize: logits must be [num_seqs, vocab_size] with a contiguous last dimension");
    check(token_counts.dim() == 2 && token_counts.is_contiguous() && token_counts.size(1) == logits.size(1) &&
              token_counts.scalar_type() == ScalarType::Int,
          "penalize: token_counts must be int32 [num_slots, vocab_size], contiguous");
    const int64_t n = logits.size(0);
    PenalizeParams p{};
    p.logits = out(logits);
    p.token_counts = static_cast<const int32_t*>(in(token_counts));
    p.slots = vector_in<int32_t>(slots, ScalarType::Int, n, "penalize", "slots");
    p.repetition = vector_in<float>(repetition, ScalarType::Float, n, "penalize", "repetition");
    p.presence = vector_in<float>(presence, ScalarType::Float, n, "penalize", "presence");
    p.frequency = vector_in<float>(frequency, ScalarType::Float, n, "penalize", "frequency");
    p.num_seqs = n;
    p.vocab_size = logits.size(1);
    p.num_slots = token_counts.size(0);
    p.logits_stride = logits.stride(0);
    p.dtype = dtype_of(logits, "logits");
    FK_LAUNCH(penalize, logits, p);
}

void count_tokens(Tensor token_ids, Tensor slots, Tensor token_counts) {
    check(token_counts.dim() == 2 && token_counts.is_contiguous() && token_counts.scalar_type() == ScalarType::Int,
          "count_tokens: token_counts must be int32 [num_slots, vocab_size], contiguous");
    CountTokensParams p{};
    p.num_seqs = token_ids.numel();
    p.token_ids = vector_in<int32_t>(token_ids, ScalarType::Int, p.num_seqs, "count_tokens", "token_ids");
    p.slots = vector_in<int32_t>(slots, ScalarType::Int, p.num_seqs, "count_tokens", "slots");
    p.token_counts = static_cast<int32_t*>(out(token_counts));
    p.vocab_size = token_counts.size(1);
    p.num_slots = token_counts.size(0);
    FK_LAUNCH(count_tokens, token_counts, p);
}

void register_sampling(torch::stable::detail::StableLibrary& m) {
    m.impl("sample", TORCH_BOX(&sample));
    m.impl("penalize", TORCH_BOX(&penalize));
    m.impl("count_tokens", TORCH_BOX(&count_tokens));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def(
        "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor "
        "steps, "
        "Tensor(a!) out_ids, Tensor(b!) out_logprobs) -> ()");
    m.def(
        "penalize(Tensor(a!) logits, Tensor token_counts, Tensor slots, Tensor repetition, Tensor presence, "
        "Tensor frequency) -> ()");
    m.def("count_tokens(Tensor token_ids, Tensor slots, Tensor(a!) token_counts) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_sampling)
