// Penalties on tokens that have occurred, in place, and the counts that they need.
//
//   occurred:            logit > 0 ? logit / repetition : logit * repetition
//   occurred in output:  logit - presence - frequency * count
//
//   logits  [num_seqs, vocab_size] bf16 | fp16 | fp32   token_counts  [num_slots, vocab_size] int32
//
// A thread owns one token of kTokensPerThread rounds, and touches the logit only where the count is not 0: 4 bytes a
// token read. Rows without a penalty are left at once. Sources: Keskar et al. 2019; OpenAI API reference.
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/vec.cuh"
#include "fastkernels/sampling.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerThread = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) penalize_kernel(const PenalizeParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int64_t seq = blockIdx.x;
    const int64_t slot = p.slots[seq];
    const float repetition = p.repetition[seq], presence = p.presence[seq], frequency = p.frequency[seq];
    if (slot < 0 || slot >= p.num_slots || (repetition == 1.0f && presence == 0.0f && frequency == 0.0f)) {
        return;
    }
    T* logits = static_cast<T*>(p.logits) + seq * p.logits_stride;
    const int32_t* counts = p.token_counts + slot * p.vocab_size;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads * kTokensPerThread + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
        const int64_t id = first + i * kThreads;
        const int32_t count = id < p.vocab_size ? counts[id] : 0;
        if (count != 0) {
            float x = to_float(logits[id]);
            x = x > 0.0f ? x / repetition : x * repetition;
            const int32_t in_output = count & (kInPrompt - 1);
            if (in_output > 0) {
                x -= presence + frequency * static_cast<float>(in_output);
            }
            logits[id] = from_float<T>(x);
        }
    }
}

__global__ void __launch_bounds__(kThreads) count_tokens_kernel(const CountTokensParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int64_t seq = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (seq >= p.num_seqs) {
        return;
    }
    const int64_t id = p.token_ids[seq], slot = p.slots[seq];
    if (id >= 0 && id < p.vocab_size && slot >= 0 && slot < p.num_slots) {
        atomicAdd(&p.token_counts[slot * p.vocab_size + id], 1);
    }
}

}  // namespace

void penalize_cuda(const PenalizeParams& p, void* stream) {
    if (p.num_seqs == 0 || p.vocab_size == 0) {
        return;
    }
    constexpr int64_t kTokensPerBlock = kThreads * kTokensPerThread;
    const int64_t blocks = (p.vocab_size + kTokensPerBlock - 1) / kTokensPerBlock;
    check(blocks <= 65535, "penalize: vocab_size is ", p.vocab_size, ", but the op takes up to ",
          65535 * kTokensPerBlock);
    visit_float(p.dtype, [&]<typename T>() {
        launch(penalize_kernel<T>, {.grid = dim3(p.num_seqs, blocks), .block = dim3(kThreads), .pdl = true}, stream, p);
    });
}

void count_tokens_cuda(const CountTokensParams& p, void* stream) {
    if (p.num_seqs == 0) {
        return;
    }
    launch(count_tokens_kernel,
           {.grid = dim3((p.num_seqs + kThreads - 1) / kThreads), .block = dim3(kThreads), .pdl = true}, stream, p);
}

}  // namespace fastkernels
