// TMA (sm_90): boxes of a tensor in global memory to shared memory, one instruction a box, completing on an mbarrier.
//
// A tensor map describes the tensor and the box. It is encoded on the host, by the driver's function, which is found
// through the runtime so that nothing links against libcuda; a kernel takes it as a __grid_constant__ parameter.
// Rows of a box are 128 bytes and swizzled: the 16-byte piece c of row r lies at piece c ^ (r % 8), which is what wgmma
// reads without bank conflicts. Boxes lie at multiples of 1024 bytes. Elements outside the tensor arrive as zeros.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/launch.h"

namespace fastkernels {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
            "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
        check(result == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled; it came with CUDA 12");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encode;
}

// A tensor of 3 dimensions, innermost first and contiguous, in boxes of [64, box[1], box[2]] elements of 16 bits.
struct TensorMap3d {
    const void* address;  // aligned to 16 bytes
    CUtensorMapDataType type;
    uint64_t extents[3];
    uint64_t strides_bytes[2];  // of the outer two, multiples of 16
    uint32_t box[3];            // at most 256 each
};

inline CUtensorMap encode(const TensorMap3d& t) {
    CUtensorMap map;
    const uint32_t element_strides[3] = {1, 1, 1};
    const CUresult result =
        tensor_map_encoder()(&map, t.type, 3, const_cast<void*>(t.address), t.extents, t.strides_bytes, t.box,
                             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a tensor of ", t.extents[2], " x ", t.extents[1],
          " x ", t.extents[0], " with strides of ", t.strides_bytes[1], " and ", t.strides_bytes[0], " bytes");
    return map;
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box whose first element has the coordinates x (innermost), y, z.
__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap& map, int x, int y, int z,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(destination),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

}  // namespace fastkernels
