// out[i] = token_ids[i], or sampled[-token_ids[i] - 1] where that is negative. Too little work for more than a thread.
#include "common/cpu/isa.h"
#include "fastkernels/embedding.h"

namespace fastkernels::cpu::FK_ISA {

void resolve_token_ids_cpu(const ResolveTokenIdsParams& p) {
    for (int64_t i = 0; i < p.num_tokens; ++i) {
        const int32_t id = p.token_ids[i];
        const int64_t from = -static_cast<int64_t>(id) - 1;
        p.out[i] = id >= 0 ? id : from < p.num_sampled ? p.sampled[from] : -1;
    }
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(resolve_token_ids_cpu, ResolveTokenIdsParams)
