// attention_sm90 for head_dim 96
#include "attention/attention_sm90.cuh"

namespace fastkernels {

template void attention_sm90_head<bf16, 96, false>(const Sm90Args&, int, void*);
template void attention_sm90_head<fp16, 96, false>(const Sm90Args&, int, void*);

}  // namespace fastkernels
