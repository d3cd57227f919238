// q turned by the angles of its positions into q_out, k turned and v as it is into their pages, in one launch.
// Shapes, ownership and bytes: rotate.cuh. Source: Su et al. 2021; the cache: fastkernels/kv_cache.h.
#include "rope/rope_append_kv_bytes.h"
#include "rope/rotate.cuh"

namespace fastkernels {

void rope_append_kv_cuda(const RopeParams& p, void* stream) {
    if (p.kv_dtype == p.dtype) {
        visit_float(p.dtype, [&]<typename T>() { launch_rope<T, T>(p, stream); });
    } else {
        rope_append_kv_bytes(p, stream);
    }
}

}  // namespace fastkernels
