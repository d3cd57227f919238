// attention_decode for head_dim 80, keys and values of one byte
#include "attention/attention_decode.cuh"

namespace fastkernels {

template void attention_decode<e4m3, 80, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 80, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 80, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 80, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 80, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 80, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 80, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 80, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 80, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 80, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 80, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 80, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<e4m3, 80, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<e5m2, 80, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<int8_t, 80, 4>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
