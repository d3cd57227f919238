// attention_decode for head_dim 96, keys and values in bf16 and fp16
#include "attention/attention_decode.cuh"

namespace fastkernels {

template void attention_decode<bf16, 96, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 96, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 96, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 96, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 96, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 96, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 96, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 96, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<bf16, 96, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<fp16, 96, 4>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
