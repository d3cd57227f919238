// Groups of 8 rows, 64 bytes of each in turn: a copy in another order. A task owns a group.
#include <algorithm>
#include <cstring>

#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "fastkernels/gemm.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkernels::cpu::FK_ISA {
namespace {

// Asks for large pages where `out` is new memory: prefetchers stop at the end of a page.
void advise_large_pages([[maybe_unused]] uint8_t* out, [[maybe_unused]] int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + size) / kPage * kPage;
    if (begin < end) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failing is no error
    }
#endif
}

}  // namespace

void interleave_rows_cpu(const InterleaveParams& p) {
    advise_large_pages(p.out, p.num_rows * p.row_bytes);
    const int64_t group_bytes = kInterleavedRows * p.row_bytes, groups = p.num_rows / kInterleavedRows;
    parallel_for(groups, 1 + 65536 / (group_bytes + 1), [&](int64_t group) {
        const uint8_t* from = p.rows + group * group_bytes;
        uint8_t* to = p.out + group * group_bytes;
        for (int64_t at = 0; at < p.row_bytes; at += kInterleavedBytes) {
            for (int64_t r = 0; r < kInterleavedRows; ++r, to += kInterleavedBytes) {
                std::memcpy(to, from + r * p.row_bytes + at, kInterleavedBytes);
            }
        }
    });
    std::copy(p.rows + groups * group_bytes, p.rows + p.num_rows * p.row_bytes, p.out + groups * group_bytes);
}

}  // namespace fastkernels::cpu::FK_ISA

FK_CPU_ENTRY(interleave_rows_cpu, InterleaveParams)
