// attention_mma for head_dim 96
#include "attention/attention_mma.cuh"

namespace fastkernels {

template void attention_mma<bf16, 96>(const AttentionMmaArgs&, dim3, void*);
template void attention_mma<fp16, 96>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
