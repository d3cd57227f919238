// out[i] = rows[indices[i]], zeros where the index is outside [0, num_rows). The ops embedding and gather_rows.
//
//   rows  [num_rows, row_size], any row stride     indices  [num_indices] int32 | int64     out  [num_indices,
//   row_size]
//
// A thread owns one unit of 16 bytes (or one element where the addresses are odd) of one output row; a row is spread
// over as many blocks as it fills. Bytes: 2 * row_size * sizeof(element) an index.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/vec.cuh"
#include "fastkernels/embedding.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 128;

// Sizes and strides of p are in Units here, as the launcher rescaled them.
template <typename Unit, typename Index>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const GatherRowsParams p, unsigned blocks_per_row) {
    const int64_t i = blockIdx.x / blocks_per_row;
    const int64_t unit = static_cast<int64_t>(blockIdx.x % blocks_per_row) * blockDim.x + threadIdx.x;
    pdl_wait();
    pdl_launch_dependents();
    if (unit >= p.row_size) {
        return;
    }
    const int64_t index = static_cast<const Index*>(p.indices)[i];
    const bool inside = index >= 0 && index < p.num_rows;
    static_cast<Unit*>(p.out)[i * p.out_stride + unit] =
        inside ? static_cast<const Unit*>(p.rows)[index * p.row_stride + unit] : Unit{};
}

}  // namespace

void gather_rows_cuda(const GatherRowsParams& p, void* stream) {
    if (p.num_indices == 0 || p.row_size == 0) {
        return;
    }
    const auto run = [&]<typename Unit>() {
        const auto elements = static_cast<int64_t>(sizeof(Unit) / size_bytes(p.dtype));
        GatherRowsParams in_units = p;
        in_units.row_size /= elements;
        in_units.row_stride /= elements;
        in_units.out_stride /= elements;
        const auto threads = static_cast<unsigned>(std::min<int64_t>(kThreads, (in_units.row_size + 31) / 32 * 32));
        const auto blocks_per_row = static_cast<unsigned>((in_units.row_size + threads - 1) / threads);
        visit_index(p.index_dtype, [&]<typename Index>() {
            launch(gather_rows_kernel<Unit, Index>,
                   {.grid = dim3(static_cast<unsigned>(p.num_indices) * blocks_per_row),
                    .block = dim3(threads),
                    .pdl = true},
                   stream, in_units, blocks_per_row);
        });
    };
    const auto bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const auto address = reinterpret_cast<uintptr_t>(p.rows) | reinterpret_cast<uintptr_t>(p.out);
    if (address % 16 == 0 && (p.row_stride | p.out_stride | p.row_size) * bytes % 16 == 0) {
        run.template operator()<uint4>();
    } else if (bytes == 4) {
        run.template operator()<uint32_t>();
    } else {
        run.template operator()<uint16_t>();
    }
}

}  // namespace fastkernels
