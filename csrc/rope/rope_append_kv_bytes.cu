// rope_append_kv into a cache of one-byte elements: k turned and rounded to its dtype, then k and v divided by the
// scales of their heads, rounded to nearest and saturated.
// Shapes, ownership and bytes: rotate.cuh. Source: Su et al. 2021; the cache: fastkernels/kv_cache.h.
#include "rope/rope_append_kv_bytes.h"
#include "rope/rotate.cuh"

namespace fastkernels {

void rope_append_kv_bytes(const RopeParams& p, void* stream) {
    visit_float(p.dtype, [&]<typename T>() {
        visit_byte(p.kv_dtype, [&]<typename Byte>() { launch_rope<T, Byte>(p, stream); });
    });
}

}  // namespace fastkernels
