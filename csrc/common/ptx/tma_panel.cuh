// TMA (sm_90) of a matrix that is stored in narrow panels, rows of 64 or 32 bytes.
#pragma once

#include "common/ptx/tma.cuh"

namespace fastkernels {

// A matrix, rows contiguous, in boxes of [panel_bytes, box_rows]. Rows of 64 bytes are swizzled: the 16-byte piece c of
// row r lies at piece c ^ (r / 2 % 4). Those of 32 lie as they are.
struct TensorMapOfPanels {
    const void* address;  // aligned to 16 bytes
    CUtensorMapDataType type;
    int element_bytes;
    int64_t rows, columns;
    int64_t row_stride_bytes;  // a multiple of 16
    int panel_bytes;           // 64 or 32
    int box_rows;              // at most 256
};

inline CUtensorMap encode(const TensorMapOfPanels& t) {
    CUtensorMap map;
    const uint64_t extents[2] = {static_cast<uint64_t>(t.columns), static_cast<uint64_t>(t.rows)};
    const uint64_t stride_bytes = static_cast<uint64_t>(t.row_stride_bytes);
    const uint32_t box[2] = {static_cast<uint32_t>(t.panel_bytes / t.element_bytes), static_cast<uint32_t>(t.box_rows)};
    const uint32_t element_strides[2] = {1, 1};
    const CUresult result = tensor_map_encoder()(
        &map, t.type, 2, const_cast<void*>(t.address), extents, &stride_bytes, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, t.panel_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses panels of ", t.rows, " x ", t.columns,
          " with a stride of ", t.row_stride_bytes, " bytes");
    return map;
}

}  // namespace fastkernels
