// What the gated activations' CPU kernels share: out = f(gate) * up. A task owns a stretch of one token's row.
#pragma once

#include <algorithm>

#include "common/cpu/dtype.h"
#include "common/cpu/math.h"
#include "common/cpu/parallel.h"
#include "fastkernels/activation.h"

namespace fastkernels::cpu::FK_ISA {

// f(float) -> float, without branches or calls.
template <typename F>
void gated(const GatedParams& p, const F& f) {
    constexpr int64_t kStretch = 4096;  // elements
    const int64_t stretches = (p.size + kStretch - 1) / kStretch;
    visit_float(p.dtype, [&]<typename T>() {
        parallel_for(p.num_tokens * stretches, 1 + 8192 / (p.size + 1), [&](int64_t task) {
            const int64_t token = task / stretches, begin = task % stretches * kStretch;
            const int64_t count = std::min(kStretch, p.size - begin);
            const T* gate = static_cast<const T*>(p.x) + token * p.x_token_stride + begin;
            const T* up = gate + p.size;
            T* out = static_cast<T*>(p.out) + token * p.out_token_stride + begin;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                out[i] = from_float<T>(f(to_float(gate[i])) * to_float(up[i]));
            }
        });
    });
}

}  // namespace fastkernels::cpu::FK_ISA
