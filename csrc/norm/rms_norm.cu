// y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; the sum in fp32.
// Shapes, ownership and bytes: row_norm.cuh. Source: Zhang and Sennrich 2019.
#include "norm/row_norm.cuh"

namespace fastkernels {

void rms_norm_cuda(const NormParams& p, void* stream) {
    launch_row_norm<NormKind::rms>("rms_norm", p, stream);
}

}  // namespace fastkernels
