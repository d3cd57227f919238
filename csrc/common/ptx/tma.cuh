// TMA (sm_90): boxes of a tensor in global memory to shared memory, one instruction a box, completing on an mbarrier;
// and back, completing in groups of the thread that issued them.
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

// A tensor of 3 dimensions, innermost first and contiguous, in boxes of box elements, rows of 128 bytes.
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

// A matrix, rows contiguous, in boxes of [128 bytes, box_rows].
struct TensorMap2d {
    const void* address;  // aligned to 16 bytes
    CUtensorMapDataType type;
    int element_bytes;
    int64_t rows, columns;
    int64_t row_stride_bytes;  // a multiple of 16
    int box_rows;              // at most 256
};

inline CUtensorMap encode(const TensorMap2d& t) {
    CUtensorMap map;
    const uint64_t extents[2] = {static_cast<uint64_t>(t.columns), static_cast<uint64_t>(t.rows)};
    const uint64_t stride_bytes = static_cast<uint64_t>(t.row_stride_bytes);
    const uint32_t box[2] = {128u / static_cast<uint32_t>(t.element_bytes), static_cast<uint32_t>(t.box_rows)};
    const uint32_t element_strides[2] = {1, 1};
    const CUresult result =
        tensor_map_encoder()(&map, t.type, 2, const_cast<void*>(t.address), extents, &stride_bytes, box,
                             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a matrix of ", t.rows, " x ", t.columns,
          " with a stride of ", t.row_stride_bytes, " bytes");
    return map;
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

// How long L2 keeps what a load brings; the numbers are what createpolicy makes of these words.
constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000;

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap& map, int x, int y, uint32_t barrier,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
        "%3}], [%4], %5;" ::"r"(destination),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
        : "memory");
}

// To the same place of every block of the cluster whose bit is set in `blocks`, completing on each one's own barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t destination, const CUtensorMap& map, int x, int y,
                                                   uint32_t barrier, uint16_t blocks, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(destination),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(blocks), "l"(policy)
        : "memory");
}

// The box from shared memory, where ordinary stores to it come after fence_async_shared(). What lies outside the tensor
// is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t source, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(source)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the last kPending groups of this thread's stores have read shared memory; or all are done altogether.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace fastkernels
