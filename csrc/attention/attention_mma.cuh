// out = softmax(scale * q k^T + mask) v on tensor cores (mma.sync), keys contiguous or in pages, fp32 accumulators.
//
//   q, out [num_tokens, num_q_heads, D]   k, v [num_keys, num_kv_heads, D] or the pages of the KV cache   bf16 | fp16
//
// A block of 4 warps owns one item of the work map for one KV head: a tile of packed rows (row r is token r / group,
// head r % group, so a block of keys is read once for all heads that share it) over a range of keys, taken in blocks
// of 64. K and V blocks alternate through one ring of shared memory, filled by cp.async kRing - 1 half steps ahead;
// warp w fetches keys [16w, 16w + 16) of each. Rows of shared memory are padded by 16 bytes, which makes their
// length an odd number of 16-byte pieces: ldmatrix and cp.async meet no bank conflict, and every address is a base
// plus a constant. Warp w owns rows [16w, 16w + 16) of each 64 and walks all keys. Sequences of few rows are
// attention_decode's.
// Softmax is online, in powers of 2; P stays in registers; O is rescaled only when a maximum of the warp grew.
// A tile split among items leaves (O, max, sum) in the workspace, and the item that finishes last adds them up in the
// order of the splits, so the result does not depend on which that is.
//
// It runs beside attention_decode, launched just before, and does not wait for it (attention.cu).
//
// Bytes: the keys once a tile, 4 * D an item and key. FLOPs: 4 * D a row and key.
// Source: Dao 2023 (FlashAttention-2), Dao et al. 2023 (Flash-Decoding), Kwon et al. 2023 (paged KV).
#pragma once

#include "attention/attention_mma.h"
#include "attention/tile.cuh"
#include "common/launch.h"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/pdl.cuh"

namespace fastkernels {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

template <int D>
struct MmaShape {
    static_assert(D % 16 == 0 && D <= 256);
    static constexpr int kRows = prefill_rows(D);
    static constexpr int kRowTiles = kRows / 64;       // m16 tiles a warp owns
    static constexpr int kStride = D + 8;              // elements between rows in shared memory
    static constexpr int kSlot = kTileKeys * kStride;  // elements of a block of K or of V
    // The queries take kRowTiles slots, the ring the others. Two blocks fit an SM of 227 KB, one of 99 KB.
    static constexpr int kSlots = D <= 96 ? 6 : D <= 128 ? 5 : 3;
    static constexpr int kSharedBytes = kSlots * kSlot * 2;
    static_assert(kMaxCombinedRows * 4 <= kSharedBytes);
};

// Fetches a warp's 16 keys of each block. A lane looks up the row of one key, one block ahead; rows past the end are
// not read but zero-filled, and no page past the one that holds key end - 1 is looked up.
template <typename T, int D>
struct KeyLoader {
    const T* k;
    const T* v;
    const int32_t* pages;  // null: contiguous
    int next_key, end;     // the key this lane looks up next
    int next_page = 0;
    uint32_t row = 0;  // in units of k_token_stride; 2^32 rows of 128 bytes are 550 GB

    __device__ KeyLoader(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head, int warp,
                         int lane) {
        k = static_cast<const T*>(a.p.k) + kv_head * a.p.k_head_stride;
        v = static_cast<const T*>(a.p.v) + kv_head * a.p.v_head_stride;
        pages = a.p.page_size > 0 ? a.p.page_table + item.seq * a.p.page_table_seq_stride : nullptr;
        next_key = work.begin + warp * 16 + lane % 16;
        end = work.end;
        look_up(a);
    }

    __device__ void look_up(const AttentionMmaArgs& a) {
        if (pages != nullptr && next_key < end) {
            next_page = pages[(next_key >> a.page_shift) * a.p.page_table_page_stride];
        }
    }

    // destination: this warp's 16 rows of a slot
    __device__ void load_k(const AttentionMmaArgs& a, const WorkItem& item, uint32_t destination, int lane) {
        row = pages != nullptr ? static_cast<uint32_t>(next_page) * a.page_rows + (next_key & (a.p.page_size - 1))
                               : static_cast<uint32_t>(item.k_begin + next_key);
        copy(k, a.p.k_token_stride, next_key - lane % 16, destination, lane);
        next_key += kTileKeys;
        look_up(a);
    }

    // the block that load_k was last called for
    __device__ void load_v(const AttentionMmaArgs& a, uint32_t destination, int lane) {
        copy(v, a.p.v_token_stride, next_key - kTileKeys - lane % 16, destination, lane);
    }

    __device__ void copy(const T* source, int64_t stride, int first_key, uint32_t destination, int lane) {
        constexpr int kPieces = D / 8;
#pragma unroll
        for (int i = 0; i < kPieces / 2; ++i) {
            const int piece = lane + 32 * i, r = piece / kPieces, column = piece % kPieces * 8;
            const bool valid = first_key + r < end;
            const int64_t from = __shfl_sync(0xffffffffu, row, r) * stride + column;
            cp_async_16(destination + (r * MmaShape<D>::kStride + column) * 2, source + (valid ? from : 0), valid);
        }
    }
};

// kRowTiles: m16 tiles a warp owns; 1 also for a tile of at most 64 rows.
template <typename T, int D, int kRowTiles>
__device__ __forceinline__ void attend(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head,
                                       T* shared) {
    using Shape = MmaShape<D>;
    constexpr int kStride = Shape::kStride, kSlot = Shape::kSlot;
    constexpr int kRing = Shape::kSlots - kRowTiles;
    constexpr int kKeyTiles = kTileKeys / 8;
    static_assert(kRing >= 2);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, group_row = lane / 4;
    const int num_blocks = max(0, work.end - work.begin + kTileKeys - 1) / kTileKeys;
    const uint32_t q_shared = shared_address(shared);
    const uint32_t ring = q_shared + kRowTiles * kSlot * 2;
    const bool active = warp * 16 < work.rows;

    // --- Queries to shared memory
    // -------------------------------------------------------------------------------------
    constexpr int kPieces = D / 8;
    for (int piece = threadIdx.x; piece < kRowTiles * 64 * kPieces; piece += kThreads) {
        const int row = piece / kPieces, column = piece % kPieces * 8;
        const bool valid = row < work.rows;
        const T* q = static_cast<const T*>(a.p.q) + row_of_q(a, work, kv_head, valid ? row : 0);
        cp_async_16(q_shared + (row * kStride + column) * 2, q + column, valid);
    }

    // --- The ring: half step 2j multiplies by K of block j, half step 2j + 1 by its V --------------------------------
    KeyLoader<T, D> loader(a, item, work, kv_head, warp, lane);
    int write_slot = 0, read_slot = 0;
    const auto fetch = [&](int half_step) {
        if (half_step < 2 * num_blocks) {
            const uint32_t destination = ring + (write_slot * kSlot + warp * 16 * kStride) * 2;
            if (half_step % 2 == 0) {
                loader.load_k(a, item, destination, lane);
            } else {
                loader.load_v(a, destination, lane);
            }
        }
        write_slot = write_slot + 1 == kRing ? 0 : write_slot + 1;
        cp_async_commit();
    };
    // Waits for the half step's slot, then refills the one read in the half step before.
    const auto advance = [&](int half_step) {
        cp_async_wait<kRing - 2>();
        __syncthreads();
        fetch(half_step + kRing - 1);
        const uint32_t slot = ring + read_slot * kSlot * 2;
        read_slot = read_slot + 1 == kRing ? 0 : read_slot + 1;
        return slot;
    };
#pragma unroll
    for (int half_step = 0; half_step < kRing - 1; ++half_step) {
        fetch(half_step);
    }

    float o[kRowTiles][D / 8][4] = {};
    float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};  // of rows group_row and group_row + 8; sums of this lane
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
        row_max[i][0] = row_max[i][1] = kNegInf;
    }
    // Lane addresses within a slot (common/ptx/ldmatrix.cuh): K's rows are B's columns, V is transposed on the way.
    const uint32_t k_lane = ((lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8) * 2;
    const uint32_t v_lane = (lane % 16 * kStride + lane / 16 * 8) * 2;
    const uint32_t q_lane = q_shared + ((warp * 16 + lane % 16) * kStride + lane / 16 * 8) * 2;

    for (int block = 0; block < num_blocks; ++block) {
        // S = Q K^T
        const uint32_t k_slot = advance(2 * block) + k_lane;
        uint32_t p_fragments[kRowTiles][kKeyTiles / 2][4];
        if (active) {
            float s[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t q[kRowTiles][4];
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    ldmatrix_x4(q[i], q_lane + (i * 64 * kStride + d * 16) * 2);
                }
#pragma unroll
                for (int n = 0; n < kKeyTiles / 2; ++n) {
                    uint32_t b[4];
                    ldmatrix_x4(b, k_slot + (n * 16 * kStride + d * 16) * 2);
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) {
                        mma_m16n8k16<T>(s[i][2 * n], q[i], b[0], b[1]);
                        mma_m16n8k16<T>(s[i][2 * n + 1], q[i], b[2], b[3]);
                    }
                }
            }

            // Soft cap, then the mask where this block of keys crosses an edge.
            if (a.p.soft_cap > 0.0f) {
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {  // tanh(x) = 1 - 2 / (1 + e^2x)
                            s[i][n][e] = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(s[i][n][e] * a.tanh_exponent));
                        }
                    }
                }
            }
            const int block_begin = work.begin + block * kTileKeys;
            if (work.crosses_edge(a, block_begin, kTileKeys)) {
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const Visible visible(a, work, i * 64 + warp * 16 + group_row + half * 8);
                        const int first_key = block_begin + quad * 2;
#pragma unroll
                        for (int n = 0; n < kKeyTiles; ++n) {
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

            // P = 2^(exponent * (S - max)), rounded to T as the A operand of P V; O and the sums follow the maximum.
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                float correction[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float m = row_max[i][half];
#pragma unroll
                    for (int n = 0; n < kKeyTiles; ++n) {
                        m = fmaxf(m, fmaxf(s[i][n][half * 2], s[i][n][half * 2 + 1]));
                    }
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
                    const float shift = finite_max(m) * a.exponent;
                    correction[half] = exp2_approx(row_max[i][half] * a.exponent - shift);
                    row_max[i][half] = m;
                    float sum = 0.0f;
#pragma unroll
                    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& x = s[i][n][half * 2 + e];
                            x = exp2_approx(x * a.exponent - shift);
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
#pragma unroll
                for (int n = 0; n < kKeyTiles / 2; ++n) {
                    p_fragments[i][n][0] = pack_pair<T>(s[i][2 * n][0], s[i][2 * n][1]);
                    p_fragments[i][n][1] = pack_pair<T>(s[i][2 * n][2], s[i][2 * n][3]);
                    p_fragments[i][n][2] = pack_pair<T>(s[i][2 * n + 1][0], s[i][2 * n + 1][1]);
                    p_fragments[i][n][3] = pack_pair<T>(s[i][2 * n + 1][2], s[i][2 * n + 1][3]);
                }
            }
        }

        // O += P V
        const uint32_t v_slot = advance(2 * block + 1) + v_lane;
        if (active) {
#pragma unroll
            for (int n = 0; n < kKeyTiles / 2; ++n) {
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, v_slot + (n * 16 * kStride + d * 16) * 2);
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) {
                        mma_m16n8k16<T>(o[i][2 * d], p_fragments[i][n], b[0], b[1]);
                        mma_m16n8k16<T>(o[i][2 * d + 1], p_fragments[i][n], b[2], b[3]);
                    }
                }
            }
        }
    }
    cp_async_wait<0>();

    // --- Sums over the quad; the maxima become powers of 2 -----------------------------------------------------------
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_sum[i][half] += __shfl_xor_sync(0xffffffffu, row_sum[i][half], 1);
            row_sum[i][half] += __shfl_xor_sync(0xffffffffu, row_sum[i][half], 2);
            row_max[i][half] *= a.exponent;
        }
    }

#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = i * 64 + warp * 16 + group_row + half * 8;
            if (row < work.rows) {
                if (item.num_splits == 1) {
                    const float scale = row_sum[i][half] > 0.0f ? 1.0f / row_sum[i][half] : 0.0f;
                    T* out = out_row<T>(a, work, kv_head, row) + quad * 2;
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
                        *reinterpret_cast<uint32_t*>(out + n * 8) =
                            pack_pair<T>(o[i][n][half * 2] * scale, o[i][n][half * 2 + 1] * scale);
                    }
                } else {
                    float* partial = partial_row<D>(a, item, work, kv_head, item.split, row);
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
                        *reinterpret_cast<float2*>(partial + n * 8 + quad * 2) =
                            make_float2(o[i][n][half * 2], o[i][n][half * 2 + 1]);
                    }
                    if (quad == 0) {
                        *reinterpret_cast<float2*>(partial + D) = make_float2(row_max[i][half], row_sum[i][half]);
                    }
                }
            }
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    attention_mma_kernel(const __grid_constant__ AttentionMmaArgs a) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    T* shared = reinterpret_cast<T*>(shared_bytes);
    const int kv_head = blockIdx.y;
    pdl_launch_dependents();
    const WorkItem item = reinterpret_cast<const WorkItem*>(a.p.work_map + a.prefill_item_offset)[blockIdx.x];
    if (static_cast<int>(blockIdx.x) < a.p.work_map[1] && (a.p.page_size == 0 || item.len_k > 0)) {
        const Work work(a, item, MmaShape<D>::kRows);
        if (MmaShape<D>::kRowTiles == 1 || work.rows <= 64) {
            attend<T, D, 1>(a, item, work, kv_head, shared);
        } else if constexpr (MmaShape<D>::kRowTiles > 1) {
            attend<T, D, MmaShape<D>::kRowTiles>(a, item, work, kv_head, shared);
        }
        if (item.num_splits > 1) {
            combine_if_last<T, D, kThreads>(a, item, work, kv_head, reinterpret_cast<float*>(shared_bytes));
        }
    }
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        pdl_wait();  // for attention_decode: whoever waits for this kernel has waited for both
    }
}

}  // namespace

template <typename T, int D>
void attention_mma(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    launch(attention_mma_kernel<T, D>,
           {.grid = grid, .block = dim3(kThreads), .shared_bytes = MmaShape<D>::kSharedBytes, .pdl = true}, stream, a);
}

}  // namespace fastkernels
