// to[layer][to_pages[i]] = from[layer][from_pages[i]] for every layer and pair i, in one launch: copy on write, and the
// swap of a sequence's pages to pinned host memory and back, which the kernel reads and writes itself.
//
//   from, to  [num_layers], each [num_pages, page_bytes]      from_pages, to_pages  [num_pairs] int32
//
// A chunk is kThreads * kUnits units of 16 bytes (or one, where addresses or pages are odd) of one page of one layer. A
// block owns one; or, where the bus to the host is what is slow, every gridDim.x-th, so that the copy leaves the SMs
// to what runs beside it. Bytes: 2 * page_bytes a pair and layer.
#include <algorithm>

#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "fastkernels/kv_cache.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 128, kUnits = 2;
constexpr unsigned kHostBlocks = 64;  // 256 KB in flight, twice what a bus of 64 GB/s takes

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(const __grid_constant__ CopyPagesParams p, unsigned chunks_per_page, unsigned num_chunks) {
    const auto units = static_cast<unsigned>(p.page_bytes / sizeof(Unit));
    const unsigned num_pairs = static_cast<unsigned>(p.num_pairs);
    pdl_launch_dependents();
    pdl_wait();
    for (unsigned i = blockIdx.x; i < num_chunks; i += gridDim.x) {
        const unsigned page = i / chunks_per_page, chunk = i - page * chunks_per_page;
        const unsigned layer = page / num_pairs, pair = page - layer * num_pairs;
        const int from_page = p.from_pages[pair], to_page = p.to_pages[pair];
        if (from_page < 0 || from_page >= p.num_from_pages || to_page < 0 || to_page >= p.num_to_pages) {
            continue;
        }
        const unsigned first = chunk * kThreads * kUnits + threadIdx.x;
        const Unit* from = static_cast<const Unit*>(p.from[layer]) + static_cast<int64_t>(from_page) * units + first;
        Unit* to = static_cast<Unit*>(p.to[layer]) + static_cast<int64_t>(to_page) * units + first;
        Unit kept[kUnits];
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
            if (first + j * kThreads < units) {
                kept[j] = from[j * kThreads];
            }
        }
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
            if (first + j * kThreads < units) {
                to[j * kThreads] = kept[j];
            }
        }
    }
}

}  // namespace

void copy_pages_cuda(const CopyPagesParams& p, void* stream) {
    if (p.num_pairs == 0 || p.page_bytes == 0) {
        return;
    }
    const auto run = [&]<typename Unit>() {
        constexpr int64_t kChunkBytes = kThreads * kUnits * sizeof(Unit);
        const int64_t chunks_per_page = (p.page_bytes + kChunkBytes - 1) / kChunkBytes;
        const int64_t num_chunks = chunks_per_page * p.num_pairs * p.num_layers;
        check(num_chunks < (int64_t{1} << 31), "copy_pages: the call copies ", num_chunks, " chunks of ", kChunkBytes,
              " bytes, but the op takes fewer than 2^31");
        const auto blocks = static_cast<unsigned>(num_chunks);
        launch(
            copy_pages_kernel<Unit>,
            {.grid = dim3(p.has_host ? std::min(blocks, kHostBlocks) : blocks), .block = dim3(kThreads), .pdl = true},
            stream, p, static_cast<unsigned>(chunks_per_page), blocks);
    };
    auto odd = static_cast<uintptr_t>(p.page_bytes);
    for (int layer = 0; layer < p.num_layers; ++layer) {
        odd |= reinterpret_cast<uintptr_t>(p.from[layer]) | reinterpret_cast<uintptr_t>(p.to[layer]);
    }
    if (odd % sizeof(uint4) == 0) {
        run.template operator()<uint4>();
    } else {
        run.template operator()<uint8_t>();
    }
}

}  // namespace fastkernels
