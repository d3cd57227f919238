// q and k turned by the angles of their positions (the formula: fastkernels/rope.h).
// Shapes, ownership and bytes: rotate.cuh. Source: Su et al. 2021.
#include "rope/rotate.cuh"

namespace fastkernels {

void rope_cuda(const RopeParams& p, void* stream) {
    visit_float(p.dtype, [&]<typename T>() { launch_rope<T, void>(p, stream); });
}

}  // namespace fastkernels
