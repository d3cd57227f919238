// TMA (sm_90) of a matrix whose rows are two halves, of a gate and of what it gates: 8 rows of each in turn, so that in
// what wgmma makes of them a thread has both.
#pragma once

#include "common/ptx/tma.cuh"

namespace fastkernels {

// A matrix whose rows are two halves, in boxes of [128 bytes, box_rows], in which 8 rows of the first half and the 8 of
// the other with the same places take turns.
// The halves are further apart than the eights, so the strides do not rise, which the driver takes (580, CUDA 13.0).
struct TensorMapOfHalves {
    const void* address;  // aligned to 16 bytes
    CUtensorMapDataType type;
    int element_bytes;
    int64_t half_rows, columns;  // half_rows: a multiple of 8
    int64_t row_stride_bytes;    // a multiple of 16
    int box_rows;                // a multiple of 16, at most 256
};

inline CUtensorMap encode(const TensorMapOfHalves& t) {
    CUtensorMap map;
    const auto stride = static_cast<uint64_t>(t.row_stride_bytes), half = static_cast<uint64_t>(t.half_rows);
    const uint64_t extents[4] = {static_cast<uint64_t>(t.columns), 8, 2, half / 8};
    const uint64_t strides_bytes[3] = {stride, half * stride, 8 * stride};
    const uint32_t box[4] = {128u / static_cast<uint32_t>(t.element_bytes), 8, 2,
                             static_cast<uint32_t>(t.box_rows) / 16};
    const uint32_t element_strides[4] = {1, 1, 1, 1};
    const CUresult result =
        tensor_map_encoder()(&map, t.type, 4, const_cast<void*>(t.address), extents, strides_bytes, box,
                             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses two halves of ", t.half_rows, " x ", t.columns,
          " with a stride of ", t.row_stride_bytes, " bytes");
    return map;
}

// By a TensorMapOfHalves: the box whose first row is the y-th of those that take turns, a multiple of 16.
__device__ __forceinline__ void tma_load_halves(uint32_t destination, const CUtensorMap& map, int x, int y,
                                                uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
        "%3, %3, %4}], [%5], %6;" ::"r"(destination),
        "l"(&map), "r"(x), "r"(0), "r"(y / 16), "r"(barrier), "l"(policy)
        : "memory");
}

// As tma_load_multicast.
__device__ __forceinline__ void tma_load_halves_multicast(uint32_t destination, const CUtensorMap& map, int x, int y,
                                                          uint32_t barrier, uint16_t blocks, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%2, %3, %3, %4}], [%5], %6, %7;" ::"r"(destination),
        "l"(&map), "r"(x), "r"(0), "r"(y / 16), "r"(barrier), "h"(blocks), "l"(policy)
        : "memory");
}

}  // namespace fastkernels
