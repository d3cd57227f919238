// out = x * (1 / scale) in fp32, rounded to nearest and even, with one scale or one a token or a block of 128 elements.
// Shapes and ownership: common/quantize_rows.cuh. Bytes: size * (sizeof(T) + 1) a token.
#include "common/quantize_rows.cuh"
#include "fastkernels/quant.h"

namespace fastkernels {
namespace {

template <typename T>
struct Plain {
    const T* x;
    int64_t token_stride;

    using Raw = Vec<T, kVecElements<T>>;
    static constexpr bool kKeepsFloats = false;

    __device__ __forceinline__ Raw read(unsigned token, int at) const {
        return load_vec<kVecElements<T>>(x + token * token_stride + at);
    }
    __device__ __forceinline__ void compute(const Raw& raw, float (&y)[kVecElements<T>]) const {
        to_floats(raw, y);
    }
};

}  // namespace

void quantize_cuda(const QuantizeParams& p, void* stream) {
    visit_float(p.dtype, [&]<typename T>() {
        const Plain<T> source{static_cast<const T*>(p.x), p.x_token_stride};
        const auto address = reinterpret_cast<uintptr_t>(p.x);
        const ByteRows rows{p.out, p.out_token_stride, p.num_tokens, p.size, p.bytes};
        if (p.bytes.type == ByteType::e5m2) {
            launch_quantize_to<__nv_fp8_e5m2, T>("quantize", source, address, p.x_token_stride, rows, stream);
        } else {
            launch_quantize<T>("quantize", source, address, p.x_token_stride, rows, stream);
        }
    });
}

}  // namespace fastkernels
