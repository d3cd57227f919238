// attention_sm90 for head_dim 128
#include "attention/attention_sm90.cuh"

namespace fastkernels {

template void attention_sm90_head<bf16, 128, false>(const Sm90Args&, int, void*);
template void attention_sm90_head<fp16, 128, false>(const Sm90Args&, int, void*);

}  // namespace fastkernels
