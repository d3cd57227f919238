// out = softmax(scale * q k^T + mask) v for sequences of few queries: the keys are read once, at the speed of memory.
//
//   q, out [num_tokens, num_q_heads, D]   bf16 | fp16
//   k, v   the pages of the KV cache, or [num_keys, num_kv_heads, D]: dtype of q, or one byte (e4m3, e5m2, int8) with
//          a scale for each KV head
//
// A block of 4 warps, or 8 where the step has few rows, owns one decode item of the work map for one KV head: up to 8 *
// kTiles packed rows (row r is token r / group, head r % group) over a range of keys, taken in blocks of 64 (128). Warp
// w owns keys [16w, 16w + 16) of each block and all rows: it fetches its keys into a ring of its own (K and V in turn,
// cp.async, kRing - 1 half steps ahead) and multiplies by them, so no warp waits for another before the end, when they
// merge their (max, sum, O) through shared memory. Rows of shared memory are an odd number of 16-byte pieces long:
// ldmatrix and cp.async meet no bank conflict. Blocks of the KV heads of one item follow each other, so that what lies
// together in a page is read at about one time.
//
// The keys are the rows of mma's tile of 16 x 8 and the queries its columns, S^T = K Q^T and O^T += V^T P^T, so that
// the 4 rows that a token has with a group of 4 cost one tile. Weights are turned by movmatrix. The maximum that they
// are relative to stays where it is until one is 2^kSlack times as large, so that the usual step has no shuffle.
//
// One-byte keys and values become fp16 in registers, exactly. ldmatrix moves pairs of bytes: a lane gets four
// neighbouring dimensions of a key, and q is laid out to match; of V it gets two neighbouring dimensions of two keys,
// which become two rows of O^T. The scale of K joins that of the scores, the scale of V that of the output.
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

#include "attention/attention_decode_queries.cuh"
#include "common/launch.h"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/movmatrix.cuh"
#include "common/ptx/pdl.cuh"

namespace fastkernels {
namespace {

// 16 bytes of each of 16 keys, and the next 16 where there are more: d[0] of keys 0 to 7, d[1] of 8 to 15, d[2] and
// d[3] of the next.
template <bool kTrans>
__device__ __forceinline__ void load_byte_tiles(uint32_t (&d)[4], uint32_t address, bool more) {
    if (more) {
        kTrans ? ldmatrix_x4_trans(d, address) : ldmatrix_x4(d, address);
    } else {
        uint32_t two[2];
        kTrans ? ldmatrix_x2_trans(two, address) : ldmatrix_x2(two, address);
        d[0] = two[0];
        d[1] = two[1];
    }
}

// Where a maximum grows by less than a factor of 2^this, the weights go on from the old one.
constexpr float kSlack = 8.0f;

// kTiles: of the work, at most those of the shape.
template <typename KV, int D, int kTiles, typename Shape>
__device__ __forceinline__ void attend(const AttentionMmaArgs& a, const WorkItem& item, const Work& work, int kv_head,
                                       unsigned char* shared) {
    using M = std::conditional_t<kIsByte<KV>, fp16, KV>;  // of the products
    static_assert(8 * kTiles <= Shape::kRows && kTiles <= Shape::kWarps);
    constexpr int kSlot = Shape::kSlot, kStride = Shape::kStride, kRing = Shape::kRing, kWarps = Shape::kWarps;
    constexpr int kThreads = Shape::kThreads, kBlockKeys = Shape::kBlockKeys;
    constexpr int kChains = D > 128 ? 1 : 4 / kTiles;  // partial sums of a score, for more products in flight
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, group_row = lane / 4;
    const int num_blocks = max(0, work.end - work.begin + kBlockKeys - 1) / kBlockKeys;
    const uint32_t ring = shared_address(shared + warp * Shape::kWarpBytes);

    Queries<KV, D, kTiles> queries;
    queries.load(a, work, kv_head, warp, lane);

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
    queries.convert(a);
    auto* q_shared = reinterpret_cast<uint2*>(shared + kWarps * Shape::kWarpBytes);
    if constexpr (queries.kShared) {
        if (warp < kTiles) {
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                q_shared[(warp * (D / 16) + d) * 32 + lane] = queries.pieces[0][d];
            }
        }
        __syncthreads();
    }
    const auto query = [&](int i, int d) {
        if constexpr (!queries.kShared) {
            return queries.pieces[i][d];
        } else {
            return q_shared[(i * (D / 16) + d) * 32 + lane];
        }
    };

    // The lane's scores and sums are of rows 2 * quad + e of each tile, e = 0 and 1.
    float o[kTiles][D / 16][4] = {};
    float row_max[kTiles][2], row_sum[kTiles][2] = {};  // sums of this lane's keys
    float shift[kTiles][2] = {}, limit[kTiles][2];      // of exponents; of scores, above which row_max moves
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        row_max[i][0] = row_max[i][1] = limit[i][0] = limit[i][1] = kNegInf;
    }
    float qk_scale = scale_of<KV>(a.p.k_scale, kv_head);
    if constexpr (std::is_same_v<KV, e4m3>) {
        qk_scale *= scale_of<KV>(a.p.q_scale, kv_head);
    }
    const float exponent = a.exponent * (a.p.soft_cap > 0.0f ? 1.0f : qk_scale);
    const float tanh_exponent = a.tanh_exponent * qk_scale;
    // Lane addresses within a slot (common/ptx/ldmatrix.cuh): K's rows are A's, V is transposed on the way.
    const uint32_t k_lane = lane % 16 * kStride + lane / 16 * 16;
    const uint32_t v_lane = kIsByte<KV> ? k_lane : (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 16;

    for (int block = 0; block < num_blocks; ++block) {
        // S^T = K Q^T: keys group_row and group_row + 8
        const uint32_t k_slot = advance(2 * block) + k_lane;
        float s[kTiles][4];
        {
            float sums[kChains][kTiles][4] = {};
            const auto multiply = [&](int d, const uint32_t (&k)[4]) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
                    const uint2 q = query(i, d);
                    mma_m16n8k16<M>(sums[d % kChains][i], k, q.x, q.y);
                }
            };
            if constexpr (kIsByte<KV>) {
#pragma unroll
                for (int d = 0; d < D / 16; d += 2) {
                    uint32_t bytes[4], k[4];
                    load_byte_tiles<false>(bytes, k_slot + d * 16, d + 1 < D / 16);
                    unpack_bytes<KV, false>(bytes[0], k[0], k[2]);
                    unpack_bytes<KV, false>(bytes[1], k[1], k[3]);
                    multiply(d, k);
                    if (d + 1 < D / 16) {
                        unpack_bytes<KV, false>(bytes[2], k[0], k[2]);
                        unpack_bytes<KV, false>(bytes[3], k[1], k[3]);
                        multiply(d + 1, k);
                    }
                }
            } else {
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint32_t k[4];
                    ldmatrix_x4(k, k_slot + d * 32);
                    multiply(d, k);
                }
            }
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    s[i][e] = sums[0][i][e];
#pragma unroll
                    for (int chain = 1; chain < kChains; ++chain) {
                        s[i][e] += sums[chain][i][e];
                    }
                }
            }
        }

        // V is read before the softmax, whose chain of dependent steps it does not lengthen.
        const uint32_t v_slot = advance(2 * block + 1) + v_lane;
        uint32_t v[D / 16][kIsByte<KV> ? 2 : 4];
        const auto read_v = [&](int d) {
            if constexpr (!kIsByte<KV>) {
                ldmatrix_x4_trans(v[d], v_slot + d * 32);
            } else if (d % 2 == 0) {
                uint32_t bytes[4];
                load_byte_tiles<true>(bytes, v_slot + d * 16, d + 1 < D / 16);
                v[d][0] = bytes[0];
                v[d][1] = bytes[1];
                if (d + 1 < D / 16) {
                    v[d + 1][0] = bytes[2];
                    v[d + 1][1] = bytes[3];
                }
            }
        };
        if constexpr (Shape::kReadsVEarly) {
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                read_v(d);
            }
        }

        // Soft cap, then the mask where this block of keys crosses an edge.
        if (a.p.soft_cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {  // tanh(x) = 1 - 2 / (1 + e^2x)
                    s[i][e] = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(s[i][e] * tanh_exponent));
                }
            }
        }
        const int block_begin = work.begin + block * kBlockKeys;
        if (work.crosses_edge(a, block_begin, kBlockKeys)) {
            const int key = block_begin + warp * kWarpKeys + group_row;
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const Visible visible(a, work, i * 8 + quad * 2 + e);
                    s[i][e] = visible(key) ? s[i][e] : kNegInf;
                    s[i][e + 2] = visible(key + 8) ? s[i][e + 2] : kNegInf;
                }
            }
        }

        // Seldom: a maximum has grown; O and the sums follow it.
        bool grows = false;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            grows |= fmaxf(s[i][0], s[i][2]) > limit[i][0] || fmaxf(s[i][1], s[i][3]) > limit[i][1];
        }
        if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float m = fmaxf(fmaxf(s[i][e], s[i][e + 2]), row_max[i][e]);
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 4));
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 8));
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 16));
                    shift[i][e] = finite_max(m) * exponent;
                    limit[i][e] = m + kSlack / exponent;
                    const float correction = exp2_approx(row_max[i][e] * exponent - shift[i][e]);
                    row_max[i][e] = m;
                    row_sum[i][e] *= correction;
#pragma unroll
                    for (int d = 0; d < D / 16; ++d) {
                        o[i][d][e] *= correction;
                        o[i][d][e + 2] *= correction;
                    }
                }
            }
        }

        // P = 2^(exponent * (S - max)), rounded to M, and turned to be the B operand of O^T += V^T P^T.
        uint32_t weights[kTiles][2];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[i][e] = exp2_approx(s[i][e] * exponent - shift[i][e % 2]);
                row_sum[i][e % 2] += s[i][e];
            }
            weights[i][0] = movmatrix_trans(pack_pair<M>(s[i][0], s[i][1]));
            weights[i][1] = movmatrix_trans(pack_pair<M>(s[i][2], s[i][3]));
        }
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            if constexpr (!Shape::kReadsVEarly) {
                read_v(d);
            }
            uint32_t operand[4];
            if constexpr (kIsByte<KV>) {
                unpack_bytes<KV, true>(v[d][0], operand[0],
                                       operand[1]);  // the even dimensions and the odd, keys 0 to 7
                unpack_bytes<KV, true>(v[d][1], operand[2], operand[3]);  // keys 8 to 15
            }
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                if constexpr (kIsByte<KV>) {
                    mma_m16n8k16<M>(o[i][d], operand, weights[i][0], weights[i][1]);
                } else {
                    mma_m16n8k16<M>(o[i][d], v[d], weights[i][0], weights[i][1]);
                }
            }
        }
    }
    cp_async_wait<0>();

    // --- The warps merge through shared memory: O [kRows][kMergeStride] and (max in powers of 2, sum) of each, where
    // its ring was
    // ---------------------------------------------------------------------------------------------------------
    const auto merge_o = [&](int w) { return reinterpret_cast<float*>(shared + w * Shape::kWarpBytes); };
    const auto merge_sums = [&](int w) {
        return reinterpret_cast<float2*>(shared + w * Shape::kWarpBytes + Shape::kMergeBytes);
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum = row_sum[i][e];
            sum += __shfl_xor_sync(0xffffffffu, sum, 4);
            sum += __shfl_xor_sync(0xffffffffu, sum, 8);
            sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            const int row = i * 8 + quad * 2 + e;
            if (row < work.rows) {
                if (group_row == 0) {
                    merge_sums(warp)[row] = make_float2(row_max[i][e] * exponent, sum);
                }
                float* to = merge_o(warp) + row * Shape::kMergeStride;
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    if constexpr (kIsByte<KV>) {
                        *reinterpret_cast<float2*>(to + d * 16 + group_row * 2) =
                            make_float2(o[i][d][e], o[i][d][e + 2]);
                    } else {
                        to[d * 16 + group_row] = o[i][d][e];
                        to[d * 16 + group_row + 8] = o[i][d][e + 2];
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
            m = fmaxf(m, merge_sums(w)[row].x);
        }
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float2 part = merge_sums(w)[row];
            const float weight = exp2_approx(part.x - finite_max(m));
            sum += weight * part.y;
            add_scaled(x, *reinterpret_cast<const float4*>(merge_o(w) + row * Shape::kMergeStride + column), weight);
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

template <typename KV, int D, int kTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, DecodeShape<KV, D, kTiles, kWarps>::kMinBlocks)
    attention_decode_kernel(const __grid_constant__ AttentionMmaArgs a) {
    using Shape = DecodeShape<KV, D, kTiles, kWarps>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int index = static_cast<int>(blockIdx.x) / a.p.num_kv_heads;
    const int kv_head = static_cast<int>(blockIdx.x) % a.p.num_kv_heads;
    if (!a.beside_prefill) {
        if (a.p.num_tokens <= kPrefetchTokens && static_cast<int>(blockIdx.x) < kDecodeBlocksPerSm * a.num_sms) {
            prefetch_first_keys<Shape>(a, index, kv_head, sizeof(KV));
        }
        pdl_wait();
    }
    pdl_launch_dependents();
    const WorkItem item = reinterpret_cast<const WorkItem*>(a.p.work_map + a.item_offset)[index];
    if (index < a.p.work_map[0] && (a.p.page_size == 0 || item.len_k > 0)) {
        const Work work(a, item, Shape::kRows);
        if constexpr (kTiles == 2) {
            if (work.rows <= 8) {
                attend<KV, D, 1, Shape>(a, item, work, kv_head, shared);
            } else {
                attend<KV, D, 2, Shape>(a, item, work, kv_head, shared);
            }
        } else {
            attend<KV, D, kTiles, Shape>(a, item, work, kv_head, shared);
        }
        if (item.num_splits > 1) {
            combine_if_last<KV, D, Shape::kThreads>(a, item, work, kv_head, reinterpret_cast<float*>(shared));
        }
    }
    if (a.beside_prefill && blockIdx.x == 0) {
        pdl_wait();  // one block is enough: no kernel after this one passes its own wait before this block ends
    }
}

// The prefill tiles that no other kernel takes: rows by kRows at a time, each time over all keys. It runs beside
// attention_decode, launched just before, and does not wait for it (attention.cu).
template <typename KV, int D, int kTiles>
__global__ void __launch_bounds__(128, DecodeShape<KV, D, kTiles>::kBlocksPerSm)
    attention_rows_kernel(const __grid_constant__ AttentionMmaArgs a) {
    using Shape = DecodeShape<KV, D, kTiles>;
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
        attend<KV, D, kTiles, Shape>(a, item, work.part(a, row, Shape::kRows), kv_head, shared);
        __syncthreads();
        more = row + Shape::kRows < work.rows;
        if (!more && item.num_splits > 1) {
            combine_if_last<KV, D, Shape::kThreads>(a, item, work, kv_head, reinterpret_cast<float*>(shared));
        }
    }
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        pdl_wait();  // for attention_decode: whoever waits for this kernel has waited for both
    }
}

}  // namespace

template <typename KV, int D, int kTiles, int kWarps>
void attention_decode(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    using Shape = DecodeShape<KV, D, kTiles, kWarps>;
    // Blocks an SM: as few as take all items at once, held to by asking for so much that one more does not fit. An SM
    // with room to spare would start more of them than its share.
    const int64_t items = a.p.num_tokens * a.p.num_kv_heads;  // of sequences that are not split
    const int64_t blocks = std::clamp<int64_t>((items + a.num_sms - 1) / a.num_sms, 8 / kWarps, Shape::kBlocksPerSm);
    const int shared_bytes = std::max<int>(Shape::kSharedBytes, kSharedBytesOfSm / static_cast<int>(blocks + 1));
    launch(attention_decode_kernel<KV, D, kTiles, kWarps>,
           {.grid = grid,
            .block = dim3(Shape::kThreads),
            .shared_bytes = static_cast<size_t>(blocks < Shape::kBlocksPerSm ? shared_bytes : Shape::kSharedBytes),
            .pdl = true},
           stream, a);
}

template <typename KV, int D, int kTiles>
void attention_rows(const AttentionMmaArgs& a, dim3 grid, void* stream) {
    using Shape = DecodeShape<KV, D, kTiles>;
    launch(attention_rows_kernel<KV, D, kTiles>,
           {.grid = grid, .block = dim3(Shape::kThreads), .shared_bytes = Shape::kSharedBytes, .pdl = true}, stream, a);
}

}  // namespace fastkernels
