// residual = residual + x, rounded to its dtype; out = rms_norm(residual); the sum in fp32.
// Shapes, ownership and bytes: row_norm.cuh. Source: Zhang and Sennrich 2019.
#include "norm/row_norm.cuh"

namespace fastkernels {

void add_rms_norm_cuda(const NormParams& p, void* stream) {
    launch_row_norm<NormKind::add_rms>("add_rms_norm", p, stream);
}

}  // namespace fastkernels
