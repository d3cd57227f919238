// attention_sm90 for head_dim 96, keys and values of one byte
#include "attention/attention_sm90.cuh"

namespace fastkernels {

template void attention_sm90_head<bf16, 96, true>(const Sm90Args&, int, void*);
template void attention_sm90_head<fp16, 96, true>(const Sm90Args&, int, void*);

}  // namespace fastkernels
