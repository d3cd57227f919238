// out[i] = token_ids[i], or sampled[-token_ids[i] - 1] where that is negative: the ids that the last step sampled are
// still on the device when the host names the tokens of this one.
//
//   token_ids, out  [num_tokens] int32     sampled  [num_sampled] int32
//
// A thread owns one token. Bytes: 8 to 12 a token.
#include "common/launch.h"
#include "common/ptx/pdl.cuh"
#include "fastkernels/embedding.h"

namespace fastkernels {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) resolve_token_ids_kernel(const ResolveTokenIdsParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    pdl_launch_dependents();
    pdl_wait();
    if (i >= p.num_tokens) {
        return;
    }
    const int32_t id = p.token_ids[i];
    const int64_t from = -static_cast<int64_t>(id) - 1;
    p.out[i] = id >= 0 ? id : from < p.num_sampled ? p.sampled[from] : -1;
}

}  // namespace

void resolve_token_ids_cuda(const ResolveTokenIdsParams& p, void* stream) {
    if (p.num_tokens == 0) {
        return;
    }
    const auto blocks = static_cast<unsigned>((p.num_tokens + kThreads - 1) / kThreads);
    launch(resolve_token_ids_kernel, {.grid = dim3(blocks), .block = dim3(kThreads), .pdl = true}, stream, p);
}

}  // namespace fastkernels
