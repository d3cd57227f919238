// attention_mma for head_dim 80
#include "attention/attention_mma.cuh"

namespace fastkernels {

template void attention_mma<bf16, 80>(const AttentionMmaArgs&, dim3, void*);
template void attention_mma<fp16, 80>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
