// movmatrix (sm_75): an 8x8 matrix of 16-bit elements, transposed among the lanes of a warp. Lane l gives the elements
// 2 * (l % 4) and the next of row l / 4, and receives those of column l / 4.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

}  // namespace fastkernels
