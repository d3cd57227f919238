// out = softmax(scale * q k^T + mask) v for sequences of few queries: the keys are read once, at the speed of memory.
//
//   q, out [num_tokens, num_q_heads, D]   bf16 | fp16
//   k, v   the pages of the KV cache, or [num_keys, num_kv_heads, D]: dtype of q, or one byte (e4m3, e5m2, int8) with
//          a scale for each KV head
//
// A block of 4 warps owns one decode item of the work map for one KV head: up to 16 * kRowTiles packed rows (row r is
// token r / group, head r % group) over a range of keys, taken in blocks of 64. Warp w owns keys [16w, 16w + 16) of
// each block and all rows: it fetches its keys into a ring of its own (K and V in turn, cp.async, kRing - 1 half steps
// ahead) and multiplies by them, so no warp waits for another before the end, when they merge their (max, sum, O)
// through shared memory. Rows of shared memory are an odd number of 16-byte pieces long: ldmatrix and cp.async meet no
// bank conflict. Blocks of the KV heads of one item follow each other, so that what lies together in a page is read at
// about one time.
//
// One-byte keys and values become fp16 in registers, exactly. ldmatrix moves pairs of bytes: a lane gets four
// neighbouring dimensions of a key, and q is laid out to match; of V it gets two neighbouring dimensions of two keys,
// which become two tiles of O, the even dimensions and the odd. The scale of K joins that of the scores, the scale of
// V that of the output.
//
// A tile split among items leaves (O, max, sum) in the workspace, and the item that finishes last adds them up in the
// order of the splits, so the result does not depend on which that is.
//
// While the kernel before this one ends, the blocks of the first wave bring their first keys to the L2, going by the
// map, lengths and pages as they find them. Nothing is decided by what they read then: it may be stale.
//
// Bytes: the keys once, 2 * D * sizeof(KV) a key and KV head. Source: Dao et al. 2023 (Flash-Decoding), Kwon et al.
// 2023 (paged KV).
#pragma once

#include <algorithm>

#include "attention/attention_decode.h"
#include "attention/tile.cuh"
#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"
#include "common/ptx/prefetch.cuh"

namespace fastkernels {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpKeys = kTileKeys / kWarps;
static_assert(kWarpKeys == 16);

template <typename KV, int D, int kRowTiles>
struct DecodeShape {
    static_assert(D % 16 == 0 && D <= 256 && (kRowTiles == 1 || (kRowTiles == 2 && D <= 128)));
    static constexpr int kRows = 16 * kRowTiles;
    static constexpr int kElementBytes = sizeof(KV);
    static constexpr int kRowBytes = D * kElementBytes;
    static constexpr int kPieces = kRowBytes / 16;      // of a row
    static constexpr int kStride = (kPieces | 1) * 16;  // bytes between rows in shared memory
    static constexpr int kSlot = kWarpKeys * kStride;   // bytes of a warp's part of a block of K or of V
    static constexpr int kBlocksPerSm = kDecodeBlocksPerSm;
    static constexpr int kQBytes = kRowTiles == 1 ? 0 : kRowTiles * D / 16 * 32 * 16;  // fragments, shared by the warps
    static constexpr int kMergeStride = D + 8;                                         // floats
    static constexpr int kMergeBytes = kRows * kMergeStride * 4;                       // of a warp
    // Two blocks fit an SM of 227 KB, one of 99 KB.
    static constexpr int kRoom = 99 * 1024 - kQBytes;
    static constexpr int kRing = std::min(10, kRoom / (kWarps * kSlot));
    static constexpr int kWarpBytes = std::max(kRing * kSlot, kMergeBytes);
    static constexpr int kSharedBytes = kWarps * kWarpBytes + kQBytes;
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
    int first_key, end;                   // the warp's keys of block j are [first_key + 64 j, first_key + 64 j + 16)
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
        const int key = first_key + block * kTileKeys;
        return key < end ? pages[(key >> a.page_shift) * a.p.page_table_page_stride] : 0;
    }

    // slot: this warp's part of it. K of a block comes before its V, blocks in order.
    __device__ void load_k(const AttentionMmaArgs& a, const WorkItem& item, int kv_head, int block, uint32_t slot,
                           int lane) {
        if (whole_pages) {
            const int key = first_key + block * kTileKeys;
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
            copy_run(from + v_from_k, end - (first_key + block * kTileKeys), slot, lane);
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
            const int key = first_key + block * kTileKeys + r;
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

// Brings a block's first keys to the L2, before pdl_wait(): what it goes by may be of an earlier step or never written,
// so each index is checked against what there is.
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
    // Four blocks: a lane a run of 8 keys, of K or of V.
    const int block = lane / 4 % 4, run = lane / 2 % 2, is_v = lane / 16;
    const int key = work.begin + block * kTileKeys + warp * kWarpKeys + run * 8;
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

// Two neighbouring elements of q, of dtype, as fp16; what fp16 cannot hold becomes the largest it can.
__device__ __forceinline__ uint32_t as_fp16(uint32_t pair, DType dtype) {
    if (dtype == DType::f16) {
        return pair;
    }
    constexpr float kLargest = 65504.0f;
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
    return pack_pair<fp16>(fminf(fmaxf(low, -kLargest), kLargest), fminf(fmaxf(high, -kLargest), kLargest));
}

// The A operand of rows [16 i, 16 i + 16), dimensions [16 d, 16 d + 16) in the order that the keys come in.
template <typename KV>
__device__ __forceinline__ void load_q(const AttentionMmaArgs& a, const Work& work, int kv_head, int i, int d, int lane,
                                       uint32_t (&fragment)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + lane / 4 + half * 8;
        const bool valid = row < work.rows;
        const auto* q = static_cast<const uint16_t*>(a.p.q) + row_of_q(a, work, kv_head, valid ? row : 0) + d * 16;
        if (std::is_same_v<KV, e4m3> && a.p.q_dtype == DType::e4m3) {
            const auto* bytes = static_cast<const unsigned char*>(a.p.q) + row_of_q(a, work, kv_head, valid ? row : 0);
            const uint32_t four = valid ? *reinterpret_cast<const uint32_t*>(bytes + d * 16 + lane % 4 * 4) : 0;
            unpack_bytes<e4m3, false>(four, fragment[half], fragment[half + 2]);
        } else if constexpr (kIsByte<KV>) {
            const uint2 four = valid ? *reinterpret_cast<const uint2*>(q + lane % 4 * 4) : make_uint2(0, 0);
            fragment[half] = as_fp16(four.x, a.p.dtype);
            fragment[half + 2] = as_fp16(four.y, a.p.dtype);
        } else {
            fragment[half] = valid ? *reinterpret_cast<const uint32_t*>(q + lane % 4 * 2) : 0;
            fragment[half + 2] = valid ? *reinterpret_cast<const uint32_t*>(q + lane % 4 * 2 + 8) : 0;
        }
    }
}

template <typename KV, int D, int kRowTiles>
__device__ __forceinline__ void attend(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head,
                                       unsigned char* shared) {
    using Shape = DecodeShape<KV, D, kRowTiles>;
    using M = std::conditional_t<kIsByte<KV>, fp16, KV>;  // of the products
    constexpr int kSlot = Shape::kSlot, kStride = Shape::kStride, kRing = Shape::kRing;
    constexpr int kChains = kRowTiles == 1 && D <= 128 ? 2 : 1;  // partial sums of a score, for more products in flight
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, group_row = lane / 4;
    const int num_blocks = max(0, work.end - work.begin + kTileKeys - 1) / kTileKeys;
    const uint32_t ring = shared_address(shared + warp * Shape::kWarpBytes);

    // --- The ring: half step 2j multiplies by K of block j, half step 2j + 1 by its V --------------------------------
    KeyLoader<Shape> loader(a, item, work, kv_head, warp, lane, sizeof(KV));
    uint32_t write_slot = ring, read_slot = ring;
    const auto next = [&](uint32_t slot) { return slot == ring + (kRing - 1) * kSlot ? ring : slot + kSlot; };
    const auto fetch = [&](int half_step) {
        if (half_step < 2 * num_blocks) {
            if (half_step % 2 == 0) {
                loader.load_k(a, item, kv_head, half_step / 2, write_slot, lane);
            } else {
                loader.load_v(a, item, kv_head, half_step / 2, write_slot, lane);
            }
        }
        write_slot = next(write_slot);
        cp_async_commit();
    };
    // Waits for the half step's slot, then refills the one read in the half step before.
    const auto advance = [&](int half_step) {
        cp_async_wait<kRing - 2>();
        __syncwarp();
        fetch(half_step + kRing - 1);
        const uint32_t slot = read_slot;
        read_slot = next(read_slot);
        return slot;
    };
#pragma unroll 1
    for (int half_step = 0; half_step < kRing - 1; ++half_step) {
        fetch(half_step);
    }

    // --- Queries: each warp's registers, or fragments in shared memory that the warps share --------------------------
    [[maybe_unused]] uint32_t q_registers[kRowTiles == 1 ? D / 16 : 1][4];
    auto* q_shared = reinterpret_cast<uint4*>(shared + kWarps * Shape::kWarpBytes);
    if constexpr (kRowTiles == 1) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            load_q<KV>(a, work, kv_head, 0, d, lane, q_registers[d]);
        }
    } else {
        for (int i = warp; i < kRowTiles * D / 16; i += kWarps) {
            uint32_t q[4];
            load_q<KV>(a, work, kv_head, i / (D / 16), i % (D / 16), lane, q);
            q_shared[i * 32 + lane] = make_uint4(q[0], q[1], q[2], q[3]);
        }
        __syncthreads();
    }
    const auto q_fragment = [&](int i, int d, uint32_t (&q)[4]) {
        if constexpr (kRowTiles == 1) {
            q[0] = q_registers[d][0];
            q[1] = q_registers[d][1];
            q[2] = q_registers[d][2];
            q[3] = q_registers[d][3];
        } else {
            const uint4 x = q_shared[(i * (D / 16) + d) * 32 + lane];
            q[0] = x.x;
            q[1] = x.y;
            q[2] = x.z;
            q[3] = x.w;
        }
    };

    float o[kRowTiles][D / 8][4] = {};
    float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};  // of rows group_row and group_row + 8; sums of this lane
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
        row_max[i][0] = row_max[i][1] = kNegInf;
    }
    float qk_scale = scale_of<KV>(a.p.k_scale, kv_head);
    if constexpr (std::is_same_v<KV, e4m3>) {
        qk_scale *= scale_of<KV>(a.p.q_scale, kv_head);
    }
    const float exponent = a.exponent * (a.p.soft_cap > 0.0f ? 1.0f : qk_scale);
    const float tanh_exponent = a.tanh_exponent * qk_scale;
    // Lane addresses within a slot (common/ptx/ldmatrix.cuh): K's rows are B's columns, V is transposed on the way.
    const uint32_t byte_lane = lane % 16 * kStride;
    const uint32_t k_lane = kIsByte<KV> ? byte_lane : (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 16;
    const uint32_t v_lane = kIsByte<KV> ? byte_lane : lane % 16 * kStride + lane / 16 * 16;

    for (int block = 0; block < num_blocks; ++block) {
        // S = Q K^T
        const uint32_t k_slot = advance(2 * block) + k_lane;
        float s[kRowTiles][2][4];
        {
            float sums[kChains][kRowTiles][2][4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t b[4];
                if constexpr (kIsByte<KV>) {
                    uint32_t bytes[2];
                    ldmatrix_x2(bytes, k_slot + d * 16);
                    unpack_bytes<KV, false>(bytes[0], b[0], b[1]);
                    unpack_bytes<KV, false>(bytes[1], b[2], b[3]);
                } else {
                    ldmatrix_x4(b, k_slot + d * 32);
                }
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    uint32_t q[4];
                    q_fragment(i, d, q);
                    mma_m16n8k16<M>(sums[d % kChains][i][0], q, b[0], b[1]);
                    mma_m16n8k16<M>(sums[d % kChains][i][1], q, b[2], b[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        s[i][n][e] = kChains == 1 ? sums[0][i][n][e] : sums[0][i][n][e] + sums[kChains - 1][i][n][e];
                    }
                }
            }
        }

        // Soft cap, then the mask where this block of keys crosses an edge.
        if (a.p.soft_cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {  // tanh(x) = 1 - 2 / (1 + e^2x)
                        s[i][n][e] = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(s[i][n][e] * tanh_exponent));
                    }
                }
            }
        }
        const int block_begin = work.begin + block * kTileKeys;
        if (work.crosses_edge(a, block_begin)) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Visible visible(a, work, i * 16 + group_row + half * 8);
                    const int first_key = block_begin + warp * kWarpKeys + quad * 2;
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            if (!visible(first_key + n * 8 + e)) {
                                s[i][n][half * 2 + e] = kNegInf;
                            }
                        }
                    }
                }
            }
        }

        // P = 2^(exponent * (S - max)), rounded to M as the A operand of P V; O and the sums follow the maximum.
        uint32_t p_fragments[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            float correction[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float m = fmaxf(fmaxf(s[i][0][half * 2], s[i][0][half * 2 + 1]),
                                fmaxf(s[i][1][half * 2], s[i][1][half * 2 + 1]));
                m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
                m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
                m = fmaxf(m, row_max[i][half]);
                const float shift = finite_max(m) * exponent;
                correction[half] = exp2_approx(row_max[i][half] * exponent - shift);
                row_max[i][half] = m;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& x = s[i][n][half * 2 + e];
                        x = exp2_approx(x * exponent - shift);
                        sum += x;
                    }
                }
                row_sum[i][half] = row_sum[i][half] * correction[half] + sum;
            }
            if (__any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    o[i][n][0] *= correction[0];
                    o[i][n][1] *= correction[0];
                    o[i][n][2] *= correction[1];
                    o[i][n][3] *= correction[1];
                }
            }
            p_fragments[i][0] = pack_pair<M>(s[i][0][0], s[i][0][1]);
            p_fragments[i][1] = pack_pair<M>(s[i][0][2], s[i][0][3]);
            p_fragments[i][2] = pack_pair<M>(s[i][1][0], s[i][1][1]);
            p_fragments[i][3] = pack_pair<M>(s[i][1][2], s[i][1][3]);
        }

        // O += P V
        const uint32_t v_slot = advance(2 * block + 1) + v_lane;
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t b[4];
            if constexpr (kIsByte<KV>) {
                uint32_t bytes[2];
                ldmatrix_x2_trans(bytes, v_slot + d * 16);
                unpack_bytes<KV, true>(bytes[0], b[0], b[2]);  // the even dimensions and the odd, keys 0 to 7
                unpack_bytes<KV, true>(bytes[1], b[1], b[3]);  // keys 8 to 15
            } else {
                ldmatrix_x4_trans(b, v_slot + d * 32);
            }
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                mma_m16n8k16<M>(o[i][2 * d], p_fragments[i], b[0], b[1]);
                mma_m16n8k16<M>(o[i][2 * d + 1], p_fragments[i], b[2], b[3]);
            }
        }
    }
    cp_async_wait<0>();

    // --- The warps merge through shared memory: O [4][kRows][kMergeStride], each warp's where its ring was -----------
    __shared__ float2 merge_ms[kWarps][Shape::kRows];  // max in powers of 2, sum
    __syncwarp();
    auto* merge_o = reinterpret_cast<float*>(shared + warp * Shape::kWarpBytes);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[i][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int row = i * 16 + group_row + half * 8;
            if (row < work.rows) {
                if (quad == 0) {
                    merge_ms[warp][row] = make_float2(row_max[i][half] * exponent, sum);
                }
                float* to = merge_o + row * Shape::kMergeStride;
#pragma unroll
                for (int n = 0; n < D / 16; ++n) {
                    const float (&first)[4] = o[i][2 * n];
                    const float (&second)[4] = o[i][2 * n + 1];
                    if constexpr (kIsByte<KV>) {
                        *reinterpret_cast<float4*>(to + n * 16 + quad * 4) =
                            make_float4(first[half * 2], second[half * 2], first[half * 2 + 1], second[half * 2 + 1]);
                    } else {
                        *reinterpret_cast<float2*>(to + n * 16 + quad * 2) =
                            make_float2(first[half * 2], first[half * 2 + 1]);
                        *reinterpret_cast<float2*>(to + n * 16 + 8 + quad * 2) =
                            make_float2(second[half * 2], second[half * 2 + 1]);
                    }
                }
            }
        }
    }
    __syncthreads();
    const float v_scale = scale_of<KV>(a.p.v_scale, kv_head);
    for (int i = threadIdx.x; i < work.rows * (D / 4); i += kThreads) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        float m = kNegInf, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            m = fmaxf(m, merge_ms[w][row].x);
        }
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float2 part = merge_ms[w][row];
            const float weight = exp2_approx(part.x - finite_max(m));
            sum += weight * part.y;
            add_scaled(x,
                       *reinterpret_cast<const float4*>(shared + w * Shape::kWarpBytes +
                                                        (row * Shape::kMergeStride + column) * 4),
                       weight);
        }
        if (item.num_splits == 1) {
            store_out<KV>(a, work, kv_head, row, column, x, sum > 0.0f ? v_scale / sum : 0.0f);
        } else {
            float* partial = partial_row<D>(a, item, work, kv_head, item.split, row);
            *reinterpret_cast<float4*>(partial + column) = x;
            if (column == 0) {
                *reinterpret_cast<float2*>(partial + D) = make_float2(m, sum);
            }
        }
    }
}

template <typename KV, int D, int kRowTiles>
__global__ void __launch_bounds__(kThreads, DecodeShape<KV, D, kRowTiles>::kBlocksPerSm)
    attention_decode_kernel(const __grid_constant__ AttentionMmaArgs a) {
    using Shape = DecodeShape<KV, D, kRowTiles>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int index = static_cast<int>(blockIdx.x) / a.p.num_kv_heads;
    const int kv_head = static_cast<int>(blockIdx.x) % a.p.num_kv_heads;
    if (!a.beside_prefill) {
        if (blockIdx.x < a.first_wave) {
            prefetch_first_keys<Shape>(a, index, kv_head, sizeof(KV));
        }
        pdl_wait();
    }
    pdl_launch_dependents();
    const WorkItem item = reinterpret_cast<const WorkItem*>(a.p.work_map + a.item_offset)[index];
    if (index < a.p.work_map[0] && (a.p.page_size == 0 || item.len_k > 0)) {
        const Work work(a, item, Shape::kRows);
        attend<KV, D, kRowTiles>(a, item, work, kv_head, shared);
        if (item.num_splits > 1) {
            combine_if_last<KV, D, kThreads>(a, item, work, kv_head, reinterpret_cast<float*>(shared));
        }
    }
    if (a.beside_prefill && blockIdx.x == 0) {
        pdl_wait();  // one block is enough: no kernel after this one passes its own wait before this block ends
    }
}

// The prefill tiles that no other kernel takes: rows by kRows at a time, each time over all keys. It runs beside
// attention_decode, launched just before, and does not wait for it (attention.cu).
template <typename KV, int D, int kRowTiles>
__global__ void __launch_bounds__(kThreads, DecodeShape<KV, D, kRowTiles>::kBlocksPerSm)
    attention_rows_kernel(const __grid_constant__ AttentionMmaArgs a) {
    using Shape = DecodeShape<KV, D, kRowTiles>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int kv_head = static_cast<int>(blockIdx.y);
    pdl_launch_dependents();
    // The item is read anew each time: kept, it would cost the registers that some instances do not have.
    const auto* items = reinterpret_cast<const WorkItem*>(a.p.work_map + a.prefill_item_offset);
    bool more = static_cast<int>(blockIdx.x) < a.p.work_map[1];
    for (int row = 0; more; row += Shape::kRows) {
        const WorkItem item = items[blockIdx.x];
        const Work work(a, item, a.prefill_rows);
        if (a.p.page_size > 0 && item.len_k == 0) {
            break;
        }
        attend<KV, D, kRowTiles>(a, item, work.part(a, row, Shape::kRows), kv_head, shared);
        __syncthreads();
        more = row + Shape::kRows < work.rows;
        if (!more && item.num_splits > 1) {
            combine_if_last<KV, D, kThreads>(a, item, work, kv_head, reinterpret_cast<float*>(shared));
        }
    }
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        pdl_wait();  // for attention_decode: whoever waits for this kernel has waited for both
    }
}

}  // namespace

template <typename KV, int D, int kRowTiles>
void attention_decode(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    using Shape = DecodeShape<KV, D, kRowTiles>;
    launch(attention_decode_kernel<KV, D, kRowTiles>,
           {.grid = grid, .block = dim3(kThreads), .shared_bytes = Shape::kSharedBytes, .pdl = true}, stream, a);
}

template <typename KV, int D, int kRowTiles>
void attention_rows(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    using Shape = DecodeShape<KV, D, kRowTiles>;
    launch(attention_rows_kernel<KV, D, kRowTiles>,
           {.grid = grid, .block = dim3(kThreads), .shared_bytes = Shape::kSharedBytes, .pdl = true}, stream, a);
}

}  // namespace fastkernels
