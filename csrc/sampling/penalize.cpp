// Penalties on tokens that have occurred, in place, and the counts that they need: formulas in penalize.cu.
// A task owns one row. Sources: Keskar et al. 2019; OpenAI API reference.
#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/sampling.h"

namespace fastkernels::cpu::FK_ISA {

void penalize_cpu(const PenalizeParams& p) {
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_seqs, 1 + 16384 / (p.vocab_size + 1), [&](int64_t seq) {
            const int64_t slot = p.slots[seq];
            const float repetition = p.repetition[seq], presence = p.presence[seq], frequency = p.frequency[seq];
            if (slot < 0 || slot >= p.num_slots || (repetition == 1.0f && presence == 0.0f && frequency == 0.0f)) {
                return;
            }
            T* logits = static_cast<T*>(p.logits) + seq * p.logits_stride;
            const int32_t* counts = p.token_counts + slot * p.vocab_size;
            for (int64_t id = 0; id < p.vocab_size; ++id) {
                if (counts[id] != 0) {
                    float x = to_float(logits[id]);
                    x = x > 0.0f ? x / repetition : x * repetition;
                    const int32_t in_output = counts[id] & (kInPrompt - 1);
                    if (in_output > 0) {
                        x -= presence + frequency * static_cast<float>(in_output);
                    }
                    logits[id] = from_float<T>(x);
                }
            }
        });
    });
}

void count_tokens_cpu(const CountTokensParams& p) {
    for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
        const int64_t id = p.token_ids[seq], slot = p.slots[seq];
        if (id >= 0 && id < p.vocab_size && slot >= 0 && slot < p.num_slots) {
            ++p.token_counts[slot * p.vocab_size + id];
        }
    }
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(penalize_cpu, PenalizeParams)
FK_CPU_ENTRY(count_tokens_cpu, CountTokensParams)
