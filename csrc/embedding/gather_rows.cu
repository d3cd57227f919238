// out[i] = rows[indices[i]], zeros where the index is outside [0, num_rows). The ops embedding and gather_rows.
//
//   rows  [num_rows, row_size], any row stride          indices  [num_indices] int32 | int64
//   out   [num_indices, row_size]
//
// A thread owns kUnits units of 16 bytes (or one element each where the addresses are odd) of one output row, all in
// flight at once; a row is spread over as many blocks as it fills. Before pdl_wait() the index is brought to L2.
// Bytes: 2 * row_size * sizeof(element) an index.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"
#include "common/vec.cuh"
#include "fastkernels/embedding.h"

namespace fastkernels {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kUnits = 2;

// Sizes and strides of p are in Units here, as the launcher rescaled them.
template <typename Unit, typename Index>
__global__ void __launch_bounds__(kMaxThreads) gather_rows_kernel(const GatherRowsParams p, unsigned blocks_per_row) {
    const unsigned i = blockIdx.x / blocks_per_row;
    const unsigned first = (blockIdx.x - i * blocks_per_row) * blockDim.x * kUnits + threadIdx.x;
    const unsigned row_size = static_cast<unsigned>(p.row_size);
    const Index* indices = static_cast<const Index*>(p.indices) + i;
    Unit* out = static_cast<Unit*>(p.out) + i * p.out_stride + first;
    if (threadIdx.x == 0) {
        prefetch_l2(indices);
    }
    pdl_launch_dependents();
    pdl_wait();
    const int64_t index = *indices;
    const bool inside = index >= 0 && index < p.num_rows;
    const Unit* row = static_cast<const Unit*>(p.rows) + (inside ? index : 0) * p.row_stride + first;
    Unit units[kUnits];
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
        units[j] = inside && first + j * blockDim.x < row_size ? row[j * blockDim.x] : Unit{};
    }
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
        if (first + j * blockDim.x < row_size) {
            out[j * blockDim.x] = units[j];
        }
    }
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
        check(in_units.row_size < (int64_t{1} << 30), "gather_rows: a row has ", p.row_size,
              " elements, but the op takes fewer than 2^30 units of 16 bytes");
        const int64_t wanted = (in_units.row_size + kUnits - 1) / kUnits;
        const auto threads = static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (wanted + 31) / 32 * 32));
        const auto blocks_per_row = static_cast<unsigned>((wanted + threads - 1) / threads);
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
