// What gates are made of.
#pragma once

#include "common/ptx/ex2.cuh"
#include "common/ptx/rcp.cuh"

namespace fastkernels {

// x * sigmoid(y). The fast forms are within 1e-6 of the exact ones: below the rounding of a 16-bit result, not of fp32.
template <typename T>
__device__ __forceinline__ float times_sigmoid(float x, float y) {
    if constexpr (sizeof(T) == 2) {
        return x * rcp_approx(1.0f + exp2_approx(y * -1.44269504f));
    } else {
        return x / (1.0f + expf(-y));
    }
}

}  // namespace fastkernels
