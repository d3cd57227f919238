// What attention_sm90 makes of one-byte keys and values, and of the queries that meet them: fp16, in shared memory.
//
// TMA leaves a block of K or V in the last panels of its place in the ring, 128 bytes of a key to a row; a warp turns
// it into the panels of 64 columns that wgmma reads, row by row and panel by panel, so that nothing is overwritten
// before it is read. All panels are swizzled alike (common/ptx/tma.cuh). Of a quarter of a warp, which accesses shared
// memory at once, half the lanes take the left pieces of a row and half the right ones of another whose number is odd
// where its is even (with head_dim 64: of which the third bit differs too): no bank conflict in reads or writes.
#pragma once

#include "attention/as_fp16.cuh"
#include "attention/attention_sm90_shared.cuh"
#include "common/dtype.cuh"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"

namespace fastkernels {
namespace {

// keys: from here on zeros, of V since 0 x NaN is NaN.
template <typename Byte, typename Shape>
__device__ __forceinline__ void widen_block(uint32_t slot, int keys, int lane) {
    constexpr int kPanelBytes = Shape::kKeys * 128, kFirstPanel = Shape::kPanels - Shape::kBoxPanels;
    constexpr bool kHalfRows = Shape::kHeadDim == 64;
    constexpr int kPassRows = kHalfRows ? 8 : 4;
    constexpr int kBatch = Shape::kHeadDim == 256 ? 2 : 4;  // passes at once, as the registers allow
    const int phase = lane / 8, right = lane / 4 % 2;
    const int row = kHalfRows ? phase ^ (right * 5) : phase / 2 * 2 + right;
    const int piece = lane % 4 + (kHalfRows ? 0 : (right ^ phase % 2) * 4);  // 16 bytes; two of fp16
    const uint32_t read = slot + kFirstPanel * kPanelBytes + row * 128 + (piece ^ row) * 16;
    const uint32_t write = slot + piece / 4 * kPanelBytes + row * 128 + (piece % 4 * 2 ^ row) * 16;
    // Past the first of two passes of 4 rows the third bit of the row is set.
    const auto offset = [](int pass) { return kHalfRows ? 0 : pass % 2 * 64; };
    constexpr int kBatches = Shape::kKeys / (kBatch * kPassRows);
    uint4 x[kBatch];
    const auto load = [&](int batch) {  // of all panels
        const uint32_t from = read + batch * (kBatch * kPassRows * 128);
#pragma unroll
        for (int pass = 0; pass < kBatch; ++pass) {
            x[pass] = load_shared_16((from ^ offset(pass)) + pass * kPassRows * 128);
        }
    };
    load(0);
#pragma unroll 1
    for (int batch = 0; batch < Shape::kBoxPanels * kBatches; ++batch) {
        uint4 now[kBatch];
#pragma unroll
        for (int pass = 0; pass < kBatch; ++pass) {
            now[pass] = x[pass];
        }
        __syncwarp();  // all have read the rows that are written now
        if (batch + 1 < Shape::kBoxPanels * kBatches) {
            load(batch + 1);
        }
        const int panel = batch / kBatches, first = batch % kBatches * kBatch * kPassRows;
        const uint32_t to = write + panel * 2 * kPanelBytes + first * 128;
#pragma unroll
        for (int pass = 0; pass < kBatch; ++pass) {
            if (first + pass * kPassRows + row >= keys) {
                now[pass] = make_uint4(0, 0, 0, 0);
            }
            uint4 left, right_half;
            unpack_bytes<Byte, false>(now[pass].x, left.x, left.y);
            unpack_bytes<Byte, false>(now[pass].y, left.z, left.w);
            unpack_bytes<Byte, false>(now[pass].z, right_half.x, right_half.y);
            unpack_bytes<Byte, false>(now[pass].w, right_half.z, right_half.w);
            const uint32_t address = (to ^ offset(pass)) + pass * kPassRows * 128;
            store_shared_16(address, left);
            store_shared_16(address ^ 16, right_half);
        }
    }
}

template <typename Shape>
__device__ __forceinline__ void widen(DType dtype, uint32_t slot, int keys, int lane) {
    if (dtype == DType::e4m3) {
        widen_block<e4m3, Shape>(slot, keys, lane);
    } else if (dtype == DType::e5m2) {
        widen_block<e5m2, Shape>(slot, keys, lane);
    } else {
        widen_block<int8_t, Shape>(slot, keys, lane);
    }
}

// Q of bf16 to fp16, by a warp.
template <int kQBytes>
__device__ __forceinline__ void round_queries(uint32_t q, int lane) {
#pragma unroll 4
    for (int i = lane * 16; i < kQBytes; i += 32 * 16) {
        const uint4 x = load_shared_16(q + i);
        store_shared_16(q + i, make_uint4(as_fp16(x.x), as_fp16(x.y), as_fp16(x.z), as_fp16(x.w)));
    }
    fence_async_shared();
    __syncwarp();
}

}  // namespace
}  // namespace fastkernels
