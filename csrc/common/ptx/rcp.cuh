// rcp.approx: 1 / x, 1 ulp, denormals flushed to zero; 1 / inf is 0.
#pragma once

namespace fastkernels {

__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace fastkernels
