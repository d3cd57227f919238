// attention_decode for head_dim 64, keys and values in bf16 and fp16
#include "attention/attention_decode.cuh"

namespace fastkernels {

template void attention_decode<bf16, 64, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 64, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 64, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 64, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 64, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 64, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<bf16, 64, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<fp16, 64, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<bf16, 64, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<fp16, 64, 4>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
