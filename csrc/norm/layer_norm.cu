// y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, over the last dimension; the sums in fp32.
// Shapes, ownership and bytes: row_norm.cuh. Source: Ba, Kiros and Hinton 2016.
#include "norm/row_norm.cuh"

namespace fastkernels {

void layer_norm_cuda(const NormParams& p, void* stream) {
    launch_row_norm<NormKind::layer>("layer_norm", p, stream);
}

}  // namespace fastkernels
