// attention_decode for head_dim 128, keys and values of one byte
#include "attention/attention_decode.cuh"

namespace fastkernels {

template void attention_decode<e4m3, 128, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 128, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 128, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 128, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 128, 1, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 128, 1, 8>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 128, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 128, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 128, 2, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e4m3, 128, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<e5m2, 128, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_decode<int8_t, 128, 4, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<e4m3, 128, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<e5m2, 128, 4>(const AttentionMmaArgs&, dim3, void*);
template void attention_rows<int8_t, 128, 4>(const AttentionMmaArgs&, dim3, void*);

}  // namespace fastkernels
