// The GPU's C++ types of the floating dtypes, their conversions, and the switch from a DType to one of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace fastkernels {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(fp16 x) {
    return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
    return __float2half_rn(x);
}

// visit_float(dtype, [&]<typename T>() { ... });
template <typename F>
void visit_float(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: return f.template operator()<float>();
        case DType::f16: return f.template operator()<fp16>();
        case DType::bf16: return f.template operator()<bf16>();
        default: fail("dtype ", name(dtype), " is not supported: fp32, fp16 and bf16 are");
    }
}

// visit_index(dtype, [&]<typename I>() { ... }): token ids and positions come as int32 or int64.
template <typename F>
void visit_index(DType dtype, F&& f) {
    switch (dtype) {
        case DType::i32: return f.template operator()<int32_t>();
        case DType::i64: return f.template operator()<int64_t>();
        default: fail("index dtype ", name(dtype), " is not supported: int32 and int64 are");
    }
}

}  // namespace fastkernels
