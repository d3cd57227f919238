// 1 / x; 1 / inf is 0.
#pragma once

namespace fastkernels {

// 1 ulp, denormals flushed to zero
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounded to nearest as 1.0f / x is (all but some of 2^23 mantissas, by trial), for x from 2^-126 to 2^126: a step of
// Newton's, without the division's branches.
__device__ __forceinline__ float rcp_rounded(float x) {
    const float y = rcp_approx(x);
    return y > 0.0f ? fmaf(fmaf(-x, y, 1.0f), y, y) : y;
}

}  // namespace fastkernels
