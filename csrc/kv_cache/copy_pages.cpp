// to[layer][to_pages[i]] = from[layer][from_pages[i]] for every layer and pair i. A task owns one page of one layer.
#include <cstring>

#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "fastkernels/kv_cache.h"

namespace fastkernels::cpu::FK_ISA {

void copy_pages_cpu(const CopyPagesParams& p) {
    parallel_for(p.num_layers * p.num_pairs, 1 + (1 << 20) / (p.page_bytes + 1), [&](int64_t i) {
        const int64_t layer = i / p.num_pairs, pair = i % p.num_pairs;
        const int64_t from_page = p.from_pages[pair], to_page = p.to_pages[pair];
        if (from_page < 0 || from_page >= p.num_from_pages || to_page < 0 || to_page >= p.num_to_pages) {
            return;
        }
        std::memcpy(static_cast<char*>(p.to[layer]) + to_page * p.page_bytes,
                    static_cast<const char*>(p.from[layer]) + from_page * p.page_bytes, p.page_bytes);
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(copy_pages_cpu, CopyPagesParams)
