// attention_mma for head_dim 256
#include "attention/attention_mma.cuh"

namespace fastkernels {

template void attention_mma<bf16, 256>(const AttentionMmaArgs&, dim3, void*);
template void attention_mma<fp16, 256>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
