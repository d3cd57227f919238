// The types of matmul's operands, by that of x.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.cuh"

namespace fastkernels {

// Weights of fp8 are e4m3, whichever x is.
template <typename T>
using MatmulWeight = std::conditional_t<std::is_same_v<T, __nv_fp8_e5m2>, __nv_fp8_e4m3, T>;

template <typename T>
inline constexpr bool kIsFp8 = std::is_same_v<T, __nv_fp8_e4m3> || std::is_same_v<T, __nv_fp8_e5m2>;

template <typename T>
inline constexpr DType kMatmulDType = std::is_same_v<T, bf16>            ? DType::bf16
                                      : std::is_same_v<T, fp16>          ? DType::f16
                                      : std::is_same_v<T, int8_t>        ? DType::i8
                                      : std::is_same_v<T, __nv_fp8_e4m3> ? DType::e4m3
                                                                         : DType::e5m2;

// What products are added up in.
template <typename T>
using MatmulSum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

}  // namespace fastkernels
