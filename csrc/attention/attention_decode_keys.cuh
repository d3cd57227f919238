// The shapes of attention_decode, and how a warp's keys come to it: its ring, and the L2 ahead of it.
#pragma once

#include <algorithm>

#include "attention/attention_decode.h"
#include "attention/tile.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/prefetch.cuh"

namespace fastkernels {
namespace {

constexpr int kWarpKeys = 16;  // of a warp at a time
constexpr int kSharedBytesOfSm = 228 * 1024;

// Whether q lies in shared memory, for want of registers.
template <typename KV, int D, int kTiles>
inline constexpr bool kSharesQueries = kTiles == 4 || (sizeof(KV) == 1 && D * kTiles > 256);

// kTiles: packed rows of an item in units of 8.
template <typename KV, int D, int kTiles, int kBlockWarps = 4>
struct DecodeShape {
    static_assert(D % 16 == 0 && D <= 256 && (kTiles == 1 || kTiles == 2 || (kTiles == 4 && D <= 128)));
    static_assert(kBlockWarps == 4 || (kBlockWarps == 8 && kTiles == 1 && D <= 128));
    static constexpr int kWarps = kBlockWarps;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlockKeys = kWarps * kWarpKeys;  // of a block of threads at a time
    static constexpr int kRows = 8 * kTiles;
    static constexpr int kElementBytes = sizeof(KV);
    static constexpr int kRowBytes = D * kElementBytes;
    static constexpr int kPieces = kRowBytes / 16;      // of a row
    static constexpr int kStride = (kPieces | 1) * 16;  // bytes between rows in shared memory
    static constexpr int kSlot = kWarpKeys * kStride;   // bytes of a warp's part of a block of K or of V
    // Of an SM of 228 KB. The start and the end of one hide behind the loops of the others.
    static constexpr int kBlocksPerSm = kTiles == 1 && D <= 128 ? 16 / kWarps : kDecodeBlocksPerSm;
    static constexpr int kMinBlocks = kWarps == 8 ? 1 : kBlocksPerSm;  // that registers leave room for
    static constexpr int kQBytes = kSharesQueries<KV, D, kTiles> ? kTiles * D / 16 * 32 * 8 : 0;
    static constexpr int kMergeStride = D + 4;                    // floats
    static constexpr int kMergeBytes = kRows * kMergeStride * 4;  // of a warp: O,
    static constexpr int kMergeSumBytes = kRows * 8;              // and behind it (max, sum)
    // A block fits a GPU of 99 KB.
    static constexpr int kRoom = (kTiles == 1 && D <= 128 ? 14 * kWarps : 99) * 1024 - kQBytes;
    static constexpr int kRing = std::min(10, kRoom / (kWarps * kSlot));
    static constexpr int kWarpBytes = std::max(kRing * kSlot, kMergeBytes + kMergeSumBytes);
    static constexpr int kSharedBytes = kWarps * kWarpBytes + kQBytes;
    // Of V, before the softmax: where there are registers for it.
    static constexpr bool kReadsVEarly = D * kElementBytes <= 256 && D * kTiles <= 256;
    static_assert(kRing >= 3);
    static_assert(kMaxCombinedRows * 4 <= kSharedBytes);
};

// Fetches a warp's 16 keys of each block. In pages of 16 keys and more they lie in one page, one after the other: the
// lanes look up the pages of 32 blocks at once, and of an address only the page varies. Smaller pages and contiguous
// keys are looked up key by key. Rows past the end are not read but zero-filled, and no page past the one that holds
// key end - 1 is looked up.
template <typename Shape>
struct KeyLoader {
    const int32_t* pages;                 // null: contiguous
    bool whole_pages;                     // of 16 keys and more
    int first_key, end;                   // the warp's keys of block j are [first_key + kBlockKeys j, and 16 more)
    int these_pages = 0, next_pages = 0;  // of block lane, of 32 blocks and of the next 32
    const char* k_lane;                   // the lane's first piece of row 0 of the pages
    int64_t v_from_k;                     // bytes
    const char* from = nullptr;           // the lane's first piece of K, in the block that load_k was last called for
    uint32_t lane_offset;                 // of that piece in a slot

    __device__ KeyLoader(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head, int warp,
                         int lane, int element_bytes) {
        const char* k = static_cast<const char*>(a.p.k) + kv_head * a.p.k_head_stride * element_bytes;
        const char* v = static_cast<const char*>(a.p.v) + kv_head * a.p.v_head_stride * element_bytes;
        k_lane = k + lane * 16;
        v_from_k = v - k;
        lane_offset = lane / Shape::kPieces * Shape::kStride + lane % Shape::kPieces * 16;
        pages = a.p.page_size > 0 ? a.p.page_table + item.seq * a.p.page_table_seq_stride : nullptr;
        whole_pages = a.p.page_size >= kWarpKeys;
        first_key = work.begin + warp * kWarpKeys;
        end = work.end;
        if (whole_pages) {
            these_pages = look_up(a, lane);
            next_pages = look_up(a, lane + 32);
        }
    }

    __device__ int look_up(const AttentionMmaArgs& a, int block) const {
        const int key = first_key + block * Shape::kBlockKeys;
        return key < end ? pages[(key >> a.page_shift) * a.p.page_table_page_stride] : 0;
    }

    // slot: this warp's part of it. K of a block comes before its V, blocks in order.
    __device__ void load_k(const AttentionMmaArgs& a, const WorkItem& item, int kv_head, int block, uint32_t slot,
                           int lane) {
        if (whole_pages) {
            const int key = first_key + block * Shape::kBlockKeys;
            const int64_t row = static_cast<int64_t>(__shfl_sync(0xffffffffu, these_pages, block)) * a.page_rows +
                                (key & (a.p.page_size - 1));
            if (block % 32 == 31) {
                these_pages = next_pages;
                next_pages = look_up(a, block + 33 + lane);
            }
            from = k_lane + row * Shape::kRowBytes;
            copy_run(from, end - key, slot, lane);
        } else {
            copy_each(a, item, a.p.k, kv_head * a.p.k_head_stride, a.p.k_token_stride, block, slot, lane);
        }
    }

    __device__ void load_v(const AttentionMmaArgs& a, const WorkItem& item, int kv_head, int block, uint32_t slot,
                           int lane) {
        if (whole_pages) {
            copy_run(from + v_from_k, end - (first_key + block * Shape::kBlockKeys), slot, lane);
        } else {
            copy_each(a, item, a.p.v, kv_head * a.p.v_head_stride, a.p.v_token_stride, block, slot, lane);
        }
    }

    static constexpr int kAll = kWarpKeys * Shape::kPieces;  // 16-byte pieces of 16 keys

    // 16 keys that follow each other, of which `left` are before the end; source: the lane's first piece.
    __device__ void copy_run(const char* source, int left, uint32_t slot, int lane) const {
        if (left >= kWarpKeys) {
            copy_pieces<true>(source, left, slot, lane);
        } else {
            copy_pieces<false>(source, left, slot, lane);
        }
    }

    template <bool kWhole>
    __device__ void copy_pieces(const char* source, int left, uint32_t slot, int lane) const {
        constexpr int kRows = 32 / Shape::kPieces;  // that the lanes copy at once, where they copy whole rows
#pragma unroll
        for (int i = 0; i < (kAll + 31) / 32; ++i) {
            if constexpr (32 % Shape::kPieces == 0) {
                cp_async_16(slot + lane_offset + i * kRows * Shape::kStride, source + i * 512,
                            kWhole || lane / Shape::kPieces + i * kRows < left);
            } else {
                const int piece = lane + 32 * i, r = piece / Shape::kPieces;
                if (kAll % 32 == 0 || piece < kAll) {
                    cp_async_16(slot + r * Shape::kStride + piece % Shape::kPieces * 16, source + i * 512,
                                kWhole || r < left);
                }
            }
        }
    }

    // Key by key; strides in elements.
    __device__ void copy_each(const AttentionMmaArgs& a, const WorkItem& item, const void* source, int64_t head_offset,
                              int64_t stride, int block, uint32_t slot, int lane) const {
        constexpr int kElementBytes = Shape::kElementBytes;
#pragma unroll 1
        for (int piece = lane; piece < kAll; piece += 32) {
            const int r = piece / Shape::kPieces, column = piece % Shape::kPieces * 16;
            const int key = first_key + block * Shape::kBlockKeys + r;
            const bool valid = key < end;
            int64_t row = 0;
            if (valid && pages != nullptr) {
                row = static_cast<int64_t>(pages[(key >> a.page_shift) * a.p.page_table_page_stride]) * a.page_rows +
                      (key & (a.p.page_size - 1));
            } else if (valid) {
                row = item.k_begin + static_cast<int64_t>(key);
            }
            cp_async_16(slot + r * Shape::kStride + column,
                        static_cast<const char*>(source) + (head_offset + row * stride) * kElementBytes + column,
                        valid);
        }
    }
};

// Brings a block's keys to the L2 where they are few, before pdl_wait(): what it goes by may be of an earlier step or
// never written, so each index is checked against what there is.
template <typename Shape>
__device__ void prefetch_first_keys(const AttentionMmaArgs& a, int index, int kv_head, int element_bytes) {
    const AttentionParams& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (p.page_size < 8 || index >= __ldcg(p.work_map)) {
        return;
    }
    const int4* map = reinterpret_cast<const int4*>(p.work_map + a.item_offset) + index * (kItemInts / 4);
    const int4 first = __ldcg(map), second = __ldcg(map + 1), third = __ldcg(map + 2);
    const WorkItem item{first.x,  first.y,  first.z, first.w, second.x, second.y,
                        second.z, second.w, third.x, third.y, {}};
    if (item.seq < 0 || item.seq >= p.num_seqs || item.num_splits <= 0 || item.len_q <= 0) {
        return;
    }
    const Work work(a, item, Shape::kRows);
    if (work.end - work.begin > kPrefetchKeys) {
        return;
    }
    // A lane a run of 8 keys, of K or of V.
    const int block = lane / 4 % 4, run = lane / 2 % 2, is_v = lane / 16;
    const int key = work.begin + block * Shape::kBlockKeys + warp * kWarpKeys + run * 8;
    if (lane % 2 == 0 && key >= 0 && key < work.end && key >> a.page_shift < p.max_pages) {
        const int page = __ldcg(p.page_table + item.seq * p.page_table_seq_stride +
                                (key >> a.page_shift) * p.page_table_page_stride);
        if (page >= 0 && page < p.num_keys) {
            const int64_t row = static_cast<int64_t>(page) * a.page_rows + (key & (p.page_size - 1) & ~7);
            const char* base = static_cast<const char*>(is_v ? p.v : p.k) + kv_head * p.k_head_stride * element_bytes;
            prefetch_l2_bulk(base + row * Shape::kRowBytes, 8 * Shape::kRowBytes);
        }
    }
}

}  // namespace
}  // namespace fastkernels
