// out = silu(gate) * up, silu(x) = x / (1 + e^-x).
// Shapes, ownership and bytes: gated.cuh. Source: Shazeer 2020 (SwiGLU).
#include "activation/gated.cuh"

namespace fastkernels {
namespace {

struct Silu {
    template <typename T>
    static __device__ __forceinline__ float apply(float x) {
        return times_sigmoid<T>(x, x);
    }
};

}  // namespace

void silu_mul_cuda(const GatedParams& p, void* stream) {
    launch_gated<Silu>(p, stream);
}

void silu_mul_quant_cuda(const GatedParams& p, void* stream) {
    launch_gated_quant<Silu>("silu_mul_quant", p, stream);
}

}  // namespace fastkernels
