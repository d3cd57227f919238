// out[i] = rows[indices[i]], zeros where the index is outside [0, num_rows). The ops embedding and gather_rows.
// A task owns one output row.
#include <cstring>

#include "common/cpu/dtype.h"
#include "common/cpu/parallel.h"
#include "fastkernels/embedding.h"

namespace fastkernels::cpu::FK_ISA {

void gather_rows_cpu(const GatherRowsParams& p) {
    const auto bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t row_bytes = p.row_size * bytes;
    visit_index(p.index_dtype, [&]<typename Index>() {
        const Index* indices = static_cast<const Index*>(p.indices);
        parallel_for(p.num_indices, 1 + 65536 / (row_bytes + 1), [&](int64_t i) {
            const int64_t index = indices[i];
            char* out = static_cast<char*>(p.out) + i * p.out_stride * bytes;
            if (index >= 0 && index < p.num_rows) {
                std::memcpy(out, static_cast<const char*>(p.rows) + index * p.row_stride * bytes, row_bytes);
            } else {
                std::memset(out, 0, row_bytes);
            }
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(gather_rows_cpu, GatherRowsParams)
