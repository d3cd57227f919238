// out = gelu(gate) * up; gelu(x) = x Phi(x), Phi the standard normal's cumulative distribution, or the approximation
// x / 2 (1 + tanh u) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
// Shapes, ownership and bytes: gated.cuh. Source: Hendrycks and Gimpel 2016; Shazeer 2020 (GEGLU).
#include "activation/gated.cuh"

namespace fastkernels {
namespace {

struct GeluTanh {
    template <typename T>
    static __device__ __forceinline__ float apply(float x) {
        return times_sigmoid<T>(x, 1.5957691216f * (x + 0.044715f * x * x * x));
    }
};

struct GeluErf {
    template <typename T>
    static __device__ __forceinline__ float apply(float x) {
        return 0.5f * x * (1.0f + erff(0.70710678f * x));
    }
};

}  // namespace

void gelu_mul_cuda(const GatedParams& p, void* stream) {
    if (p.approximate_tanh) {
        launch_gated<GeluTanh>(p, stream);
    } else {
        launch_gated<GeluErf>(p, stream);
    }
}

}  // namespace fastkernels
