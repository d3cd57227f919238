// rms_norm whose result is bytes with scales (common/byte_scales.h), for the product that comes next.
// Shapes, ownership and bytes: row_norm.cuh. Source: Zhang and Sennrich 2019.
#include "norm/row_norm.cuh"

namespace fastkernels {

void rms_norm_quant_cuda(const NormParams& p, void* stream) {
    launch_row_norm_quant<NormKind::rms>("rms_norm_quant", p, stream);
}

}  // namespace fastkernels
