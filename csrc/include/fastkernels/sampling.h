// Sampling the next token from logits. Pointers are the GPU's for *_cuda, the CPU's for *_cpu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastkernels {

// The masses of the tokens of a row are summed in 64 bits (csrc/sampling/token_mass.h).
inline constexpr int64_t kMaxVocabSize = int64_t{1} << 22;

struct SampleParams {
    const void* logits;        // [num_seqs, vocab_size] dtype, last dimension contiguous
    const float* temperature;  // [num_seqs]; not above 0 (or NaN): greedy
    const int32_t* top_k;      // [num_seqs]; below 1: off
    const float* top_p;        // [num_seqs]; 1 and more (or NaN): off; 0 and less: the likeliest token alone
    const float* min_p;        // [num_seqs]; 0 and less (or NaN): off; above 1: as 1
    const int64_t* seeds;      // [num_seqs]
    const int32_t* steps;      // [num_seqs]
    int32_t* out_ids;          // [num_seqs]
    float* out_logprobs;       // [num_seqs]
    int64_t num_seqs;
    int64_t vocab_size;
    int64_t logits_stride;  // elements from row to row
    DType dtype;
};

void sample_cuda(const SampleParams& p, void* stream);
void sample_cpu(const SampleParams& p);

// Of an element of token_counts: the bit that says "occurs in the prompt"; the bits below count occurrences in the
// output.
inline constexpr int32_t kInPrompt = int32_t{1} << 30;

struct PenalizeParams {
    void* logits;                 // [num_seqs, vocab_size] dtype, last dimension contiguous; changed in place
    const int32_t* token_counts;  // [num_slots, vocab_size]
    const int32_t* slots;         // [num_seqs]; outside [0, num_slots): the row is left as it is
    const float* repetition;      // [num_seqs]; 1: off
    const float* presence;        // [num_seqs]; 0: off
    const float* frequency;       // [num_seqs]; 0: off
    int64_t num_seqs;
    int64_t vocab_size;
    int64_t num_slots;
    int64_t logits_stride;  // elements from row to row
    DType dtype;
};

void penalize_cuda(const PenalizeParams& p, void* stream);
void penalize_cpu(const PenalizeParams& p);

struct CountTokensParams {
    const int32_t* token_ids;  // [num_seqs]; outside [0, vocab_size): not counted
    const int32_t* slots;      // [num_seqs]; outside [0, num_slots): not counted
    int32_t* token_counts;     // [num_slots, vocab_size]
    int64_t num_seqs;
    int64_t vocab_size;
    int64_t num_slots;
};

void count_tokens_cuda(const CountTokensParams& p, void* stream);
void count_tokens_cpu(const CountTokensParams& p);

}  // namespace fastkernels
