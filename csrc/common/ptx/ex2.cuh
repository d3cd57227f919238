// ex2.approx: 2^x on the special-function unit, 2 ulp, denormal results flushed to zero; 2^-inf is 0.
#pragma once

namespace fastkernels {

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace fastkernels
