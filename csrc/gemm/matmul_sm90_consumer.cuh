// A consumer warpgroup of matmul_sm90: 64 rows of A times a tile's columns, from wgmma to the stores of out.
#pragma once

#include "common/ptx/cp_async.cuh"
#include "common/ptx/cp_async_mbarrier.cuh"
#include "common/ptx/ex2.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/store_shared.cuh"
#include "common/ptx/tma.cuh"
#include "gemm/matmul_sm90_out.cuh"
#include "gemm/matmul_sm90_product.cuh"

namespace fastkernels {
namespace {

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
using TileProduct =
    MatmulProduct<T, kScales, kTokensAreA, kN, kCluster, MatmulShape<T, kScales, kTokensAreA, kN, kCluster>>;

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
struct Consumer : TileProduct<T, kScales, kTokensAreA, kN, kCluster> {
    using Shape = MatmulShape<T, kScales, kTokensAreA, kN, kCluster>;
    using Product = TileProduct<T, kScales, kTokensAreA, kN, kCluster>;
    using Product::group, Product::kSums, Product::lane, Product::rank, Product::warp;
    using typename Product::Sum;

    const MatmulArgs& args;
    MatmulShared<Shape>& shared;
    const int worker;

    // Row of A of this warpgroup's first row.
    __device__ __forceinline__ int first_row(const MatmulPlace& place) const {
        return (place.a * kCluster + rank) * kMatmulRows + group * 64;
    }

    __device__ __forceinline__ void sync_group() const {
        named_barrier_sync(1 + group, 128);
    }

    // Of a tile that is cut: leaves this warpgroup's part in the workspace. The last to come gets the whole sum, the
    // parts added in their order, its own read back among them. Only the first part, which the sum begins with, stays
    // in registers if the others are done by then, which is the rule in stream-K where two share a tile.
    __device__ __forceinline__ bool add_parts(Sum (&sum)[kSums], const MatmulSegment& segment) {
        constexpr int kVectors = kSums / 4;
        const MatmulSchedule& schedule = args.schedule;
        const int thread = threadIdx.x % 128;
        const int parts = schedule.parts(segment.tile);
        const auto others = static_cast<unsigned>(parts - 1);
        unsigned* counter = args.counters + (segment.tile * kCluster + rank) * Shape::kConsumers + group;
        const auto part = [&](int of) {
            const int slot = schedule.slot(segment.tile, of) * kCluster + rank;
            return reinterpret_cast<uint4*>(args.partials + static_cast<int64_t>(slot) * (kN * kMatmulRows) +
                                            group * (kN * 64)) +
                   thread;
        };
        bool is_whole = false;
        if (segment.part == 0) {
            if (thread == 0) {
                const bool done = *static_cast<volatile unsigned*>(counter) == others;
                if (done) {
                    *counter = 0;
                }
                shared.others_done[group] = done;
                __threadfence();
            }
            sync_group();
            is_whole = __shfl_sync(0xffffffffu, shared.others_done[group], 0) != 0;
        }
        if (!is_whole) {
            uint4* mine = part(segment.part);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const Sum* x = sum + i * 4;
                __stcg(mine + i * 128, make_uint4(sum_bits(x[0]), sum_bits(x[1]), sum_bits(x[2]), sum_bits(x[3])));
            }
            __threadfence();
            sync_group();
            if (thread == 0) {
                shared.is_last[group] = atomicInc(counter, others) == others;  // wraps to 0, ready for the next launch
                __threadfence();
            }
            sync_group();
            if (__shfl_sync(0xffffffffu, shared.is_last[group], 0) == 0) {  // known to be the same for all lanes
                return false;
            }
            const uint4* begin = part(0);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint4 y = __ldcg(begin + i * 128);
                Sum* x = sum + i * 4;
                x[0] = sum_of_bits<Sum>(y.x);
                x[1] = sum_of_bits<Sum>(y.y);
                x[2] = sum_of_bits<Sum>(y.z);
                x[3] = sum_of_bits<Sum>(y.w);
            }
        }
#pragma unroll(kSums <= 32 ? 4 : 1)
        for (int of = 1; of < parts; ++of) {
            const uint4* theirs = part(of);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint4 y = __ldcg(theirs + i * 128);
                Sum* x = sum + i * 4;
                x[0] += sum_of_bits<Sum>(y.x);
                x[1] += sum_of_bits<Sum>(y.y);
                x[2] += sum_of_bits<Sum>(y.z);
                x[3] += sum_of_bits<Sum>(y.w);
            }
        }
        return true;
    }

    // A tile's scales, on their way to shared memory while it is multiplied.
    __device__ __forceinline__ void load_scales(const MatmulPlace& place) {
        if constexpr (kScales == MatmulScales::channel) {
            cp_async_wait<0>();
            const uint32_t to = shared_address(shared.tile_scales + group * Shape::kTileScales);
            for (int i = threadIdx.x % 128; i < Shape::kTileScales; i += 128) {
                const bool is_column = i < kN;
                const int at = is_column ? place.b * kN + i : first_row(place) + i - kN;
                cp_async_4(to + i * 4, is_column == kTokensAreA
                                           ? args.weight_scales + matmul_weight_row(args, at) * args.weight_scale_stride
                                           : args.token_scales + min(at, args.num_tokens - 1));
            }
            cp_async_commit();
        }
    }
    // Once they are there for all of the warpgroup: of columns i and i + 1, and of a row.
    __device__ __forceinline__ float2 column_scales(int i) const {
        return kScales == MatmulScales::channel
                   ? *reinterpret_cast<const float2*>(shared.tile_scales + group * Shape::kTileScales + i)
                   : make_float2(1.0f, 1.0f);
    }
    __device__ __forceinline__ float row_scale(int i) const {
        return kScales == MatmulScales::channel ? shared.tile_scales[group * Shape::kTileScales + kN + i] : 1.0f;
    }

    // Two neighbours of the residual, or one; past the edges zeros.
    __device__ __forceinline__ uint32_t residual_pair(int token, int column) const {
        const uint16_t* from =
            static_cast<const uint16_t*>(args.residual) + token * args.residual_token_stride + column;
        return token < args.num_tokens && column < args.out_size ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
    __device__ __forceinline__ float residual_value(int token, int column) const {
        return token < args.num_tokens && column < args.out_size
                   ? matmul_value(args.residual, token * args.residual_token_stride + column, args.is_fp16)
                   : 0.0f;
    }

    // x is A: D's rows are tokens. kPlain: no residual, nor bytes. kZeros: zero points. What does without is code of
    // its own, since what is run once a tile comes from memory, and takes the longer the more of it there is. A panel
    // of 64 rows of 64 columns at a time, one being filled while TMA reads the other.
    template <bool kPlain, bool kZeros>
    __device__ __forceinline__ void store_rows(const Sum (&sum)[kSums], int token, int row) {
        // begin: the warp's first row. Kept here, so that nothing made of them is kept ready through the product.
        const int l = static_cast<int>(keep(lane)), begin = static_cast<int>(keep(warp)) * 16;
        float token_scale[2], inverse = 1.0f;
        const Sum zero[2] = {kZeros ? matmul_token_zero<T>(args, token + begin + l / 4) : 0,
                             kZeros ? matmul_token_zero<T>(args, token + begin + l / 4 + 8) : 0};
#pragma unroll
        for (int pass = 0; pass < kN / 64; ++pass) {
            const uint32_t panel = shared_address(shared.out[keep(group)]) + pass % 2 * Shape::kPanelBytes;
            const int column = row + pass * 64 + l % 4 * 2;
            float more[16] = {};
            if (args.bias != nullptr) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    more[i] = matmul_bias(args, column + i / 2 * 8 + i % 2);
                }
            }
            uint32_t residual[16];  // of eight columns, two rows: two neighbours
            if (!kPlain && args.residual != nullptr) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    residual[i] = residual_pair(token + begin + l / 4 + i % 2 * 8, column + i / 2 * 8);
                }
            }
            if (threadIdx.x % 128 == 0) {
                if (pass == 0 && kN / 64 % 2 == 1) {  // the panel of the last pass before
                    tma_store_wait_read<0>();
                } else {
                    tma_store_wait_read<1>();
                }
            }
            if (pass == 0) {
                cp_async_wait<0>();
            }
            sync_group();
            if (pass == 0) {
                token_scale[0] = row_scale(begin + l / 4);
                token_scale[1] = row_scale(begin + l / 4 + 8);
                if (!kPlain && args.out_type != MatmulOut::values) {
                    inverse = 1.0f / *args.out_scale;
                }
            }
            float2 scale[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                scale[i] = column_scales(pass * 64 + i * 8 + l % 4 * 2);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float out[8];
                const int first = column + i * 16;
                const Sum row_sum[4] = {matmul_weight_sum<T>(args, first), matmul_weight_sum<T>(args, first + 1),
                                        matmul_weight_sum<T>(args, first + 8), matmul_weight_sum<T>(args, first + 9)};
#pragma unroll
                for (int j = 0; j < 8; j += 2) {  // two tiles of 8 columns, two rows
                    const int tile = i * 2 + j / 4, half = j / 2 % 2;
                    const Sum* d = sum + pass * 32 + i * 8 + j;
                    const Sum low = d[0] - zero[half] * row_sum[j / 4 * 2];
                    const Sum high = d[1] - zero[half] * row_sum[j / 4 * 2 + 1];
                    out[j] = finish_sum<kScales>(low, token_scale[half] * scale[tile].x, more[tile * 2]);
                    out[j + 1] = finish_sum<kScales>(high, token_scale[half] * scale[tile].y, more[tile * 2 + 1]);
                }
                if (!kPlain && args.residual != nullptr) {
#pragma unroll
                    for (int j = 0; j < 8; j += 2) {
                        const float2 before = matmul_pair(residual[i * 4 + j / 2], args.is_fp16);
                        out[j] += before.x;
                        out[j + 1] += before.y;
                    }
                }
                if (kPlain || args.out_type == MatmulOut::values) {
                    uint32_t pairs[4];
                    pack_out(out, pairs, args.is_fp16);
                    const uint32_t address = panel + (begin + l % 16) * 128 + ((i * 2 + l / 16) ^ l % 8) * 16;
                    stmatrix_x4(address, pairs[0], pairs[1], pairs[2], pairs[3]);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int r = begin + l / 4 + j % 2 * 8;
                        store_shared_16(
                            panel + r * 64 + (i ^ r / 2 % 4) * 16 + j / 2 * 8 + l % 4 * 2,
                            matmul_two_bytes(out[j * 2] * inverse, out[j * 2 + 1] * inverse, args.out_type));
                    }
                }
            }
            fence_async_shared();
            sync_group();
            if (threadIdx.x % 128 == 0) {
                tma_store(args.out_map, panel, row + pass * 64, token);
                tma_store_commit();
            }
        }
    }

    // The weight is A: D's columns are tokens, and D is transposed on its way. One panel of kN tokens, 64 elements
    // each.
    template <bool kPlain>
    __device__ __forceinline__ void store_columns(const Sum (&sum)[kSums], int token, int row) {
        const uint32_t panel = shared_address(shared.out[keep(group)]);
        const int l = static_cast<int>(keep(lane)), begin = static_cast<int>(keep(warp)) * 16;
        float more[2];
        Sum row_sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            more[half] = matmul_bias(args, row + begin + l / 4 + half * 8);
            row_sum[half] = matmul_weight_sum<T>(args, row + begin + l / 4 + half * 8);
        }
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read<0>();
        }
        cp_async_wait<0>();
        sync_group();
        const float weight_scale[2] = {row_scale(begin + l / 4), row_scale(begin + l / 4 + 8)};
        const float inverse = kPlain || args.out_type == MatmulOut::values ? 1.0f : 1.0f / *args.out_scale;
#pragma unroll
        for (int pass = 0; pass < kN / 32; ++pass) {
            float out[16];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = pass * 32 + i * 8 + l % 4 * 2;
                const float2 scale = column_scales(column);
                const Sum zero[2] = {matmul_token_zero<T>(args, token + column),
                                     matmul_token_zero<T>(args, token + column + 1)};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Sum* d = sum + pass * 16 + i * 4 + half * 2;
                    const Sum low = d[0] - zero[0] * row_sum[half], high = d[1] - zero[1] * row_sum[half];
                    out[i * 4 + half * 2] = finish_sum<kScales>(low, scale.x * weight_scale[half], more[half]);
                    out[i * 4 + half * 2 + 1] = finish_sum<kScales>(high, scale.y * weight_scale[half], more[half]);
                }
            }
            if (!kPlain && args.residual != nullptr) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    out[i] += residual_value(token + pass * 32 + i / 4 * 8 + l % 4 * 2 + i % 2,
                                             row + begin + l / 4 + i / 2 % 2 * 8);
                }
            }
            if (kPlain || args.out_type == MatmulOut::values) {
                uint32_t pairs[8];
                pack_out(out, pairs, args.is_fp16);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t address =
                        panel + (pass * 32 + i * 16 + l / 16 * 8 + l % 8) * 128 + ((warp * 2 + l / 8 % 2) ^ l % 8) * 16;
                    stmatrix_x4_transposed(address, pairs[i * 4], pairs[i * 4 + 1], pairs[i * 4 + 2], pairs[i * 4 + 3]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int r = pass * 32 + i / 4 * 8 + l % 4 * 2 + i % 2;
                    store_shared_8(panel + r * 64 + (warp ^ r / 2 % 4) * 16 + i / 2 % 2 * 8 + l / 4,
                                   matmul_byte(out[i] * inverse, args.out_type));
                }
            }
        }
        fence_async_shared();
        sync_group();
        if (threadIdx.x % 128 == 0) {
            tma_store(args.out_map, panel, row, token);
            tma_store_commit();
        }
    }

    // --- Of a gate ---------------------------------------------------------------------------------------------------
    // A lane has the gate and up of the same places, eights of rows of which take turns. Panels of 32 columns of out:
    // 64 bytes, swizzled, or of bytes 32.

    // Of two gates at once: a reciprocal costs as much as eight other instructions. Below -43 silu is that of -43, 43 *
    // 2^-62, so that the product of both stays finite. What is no number stays none, and does not reach its neighbour.
    static __device__ __forceinline__ void gate_pair(float (&y)[2], const float (&up)[2]) {
        float one_and[2];  // 1 + e^-y
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            y[i] = y[i] < -43.0f ? -43.0f : y[i];
            one_and[i] = 1.0f + exp2_approx(fminf(y[i] * -1.44269504f, 63.0f));
        }
        const float inverse = rcp_approx(one_and[0] * one_and[1]);
        y[0] *= one_and[1] * inverse * up[0];
        y[1] *= one_and[0] * inverse * up[1];
    }

    template <bool kZeros, bool kBytes>
    __device__ __forceinline__ void store_gated_rows(const Sum (&sum)[kSums], int token, int row) {
        const int l = static_cast<int>(keep(lane)), begin = static_cast<int>(keep(warp)) * 16;
        const int g = l / 4, t = l % 4;
        const Sum zero[2] = {kZeros ? matmul_token_zero<T>(args, token + begin + g) : 0,
                             kZeros ? matmul_token_zero<T>(args, token + begin + g + 8) : 0};
        float token_scale[2], inverse = 1.0f;
#pragma unroll
        for (int pass = 0; pass < kN / 64; ++pass) {
            const uint32_t panel = shared_address(shared.out[keep(group)]) + pass % 2 * Shape::kPanelBytes;
            if (threadIdx.x % 128 == 0) {
                if (pass == 0 && kN / 64 % 2 == 1) {  // the panel of the last pass before
                    tma_store_wait_read<0>();
                } else {
                    tma_store_wait_read<1>();
                }
            }
            if (pass == 0) {
                cp_async_wait<0>();
            }
            sync_group();
            if (pass == 0) {
                token_scale[0] = row_scale(begin + g);
                token_scale[1] = row_scale(begin + g + 8);
                if (kBytes) {
                    inverse = 1.0f / *args.out_scale;
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float out[8];  // two eights of columns, two rows
#pragma unroll
                for (int eight = 0; eight < 2; ++eight) {
                    const int of_gate = pass * 8 + (i * 2 + eight) * 2, first = of_gate * 8 + t * 2;
                    const float2 scale = column_scales(first), up_scale = column_scales(first + 8);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const Sum* d = sum + of_gate * 4 + half * 2;
                        float y[2], up[2];
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const Sum less = zero[half] * matmul_weight_sum<T>(args, row + first + j);
                            const Sum up_less = zero[half] * matmul_weight_sum<T>(args, row + first + 8 + j);
                            const float factor = j == 0 ? scale.x : scale.y,
                                        up_factor = j == 0 ? up_scale.x : up_scale.y;
                            y[j] = finish_sum<kScales>(d[j] - less, token_scale[half] * factor, 0.0f);
                            up[j] = finish_sum<kScales>(d[4 + j] - up_less, token_scale[half] * up_factor, 0.0f);
                        }
                        gate_pair(y, up);
                        out[eight * 4 + half * 2] = y[0];
                        out[eight * 4 + half * 2 + 1] = y[1];
                    }
                }
                if constexpr (!kBytes) {
                    uint32_t pairs[4];
                    pack_out(out, pairs, args.is_fp16);
                    const uint32_t address = panel + (begin + l % 16) * 64 + ((i * 2 + l / 16) ^ l % 8 / 2) * 16;
                    stmatrix_x4(address, pairs[0], pairs[1], pairs[2], pairs[3]);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        store_shared_16(
                            panel + (begin + g + j % 2 * 8) * 32 + (i * 2 + j / 2) * 8 + t * 2,
                            matmul_two_bytes(out[j * 2] * inverse, out[j * 2 + 1] * inverse, args.out_type));
                    }
                }
            }
            fence_async_shared();
            sync_group();
            if (threadIdx.x % 128 == 0) {
                tma_store(args.out_map, panel, row / 2 + pass * 32, token);
                tma_store_commit();
            }
        }
    }

    __device__ __forceinline__ void store_gated_columns(const Sum (&sum)[kSums], int token, int row) {
        const uint32_t panel = shared_address(shared.out[keep(group)]);
        const int l = static_cast<int>(keep(lane)), begin = static_cast<int>(keep(warp)) * 16, g = l / 4, t = l % 4;
        const Sum row_sum[2] = {matmul_weight_sum<T>(args, row + begin + g),
                                matmul_weight_sum<T>(args, row + begin + g + 8)};
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read<0>();
        }
        cp_async_wait<0>();
        sync_group();
        const float weight_scale[2] = {row_scale(begin + g), row_scale(begin + g + 8)};
        const float inverse = args.out_type == MatmulOut::values ? 1.0f : 1.0f / *args.out_scale;
#pragma unroll
        for (int pass = 0; pass < kN / 32; ++pass) {
            float out[8];  // four eights of tokens
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = pass * 32 + i * 8 + t * 2;
                const float2 scale = column_scales(column);
                const Sum* d = sum + pass * 16 + i * 4;
                float y[2], up[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const Sum zero = matmul_token_zero<T>(args, token + column + j);
                    const float factor = j == 0 ? scale.x : scale.y;
                    y[j] = finish_sum<kScales>(d[j] - zero * row_sum[0], factor * weight_scale[0], 0.0f);
                    up[j] = finish_sum<kScales>(d[2 + j] - zero * row_sum[1], factor * weight_scale[1], 0.0f);
                }
                gate_pair(y, up);
                out[i * 2] = y[0];
                out[i * 2 + 1] = y[1];
            }
            if (args.out_type == MatmulOut::values) {
                uint32_t pairs[4];
                pack_out(out, pairs, args.is_fp16);
                stmatrix_x4_transposed(panel + (pass * 32 + l) * 64 + (warp ^ l % 8 / 2) * 16, pairs[0], pairs[1],
                                       pairs[2], pairs[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    store_shared_8(panel + (pass * 32 + i / 2 * 8 + t * 2 + i % 2) * 32 + warp * 8 + g,
                                   matmul_byte(out[i] * inverse, args.out_type));
                }
            }
        }
        fence_async_shared();
        sync_group();
        if (threadIdx.x % 128 == 0) {
            tma_store(args.out_map, panel, row / 2, token);
            tma_store_commit();
        }
    }

    template <bool kZeros>
    __device__ __forceinline__ void store_tile(const Sum (&sum)[kSums], int row, int column) {
        if constexpr (kTokensAreA) {
            if (args.gated) {
                args.out_type == MatmulOut::values ? store_gated_rows<kZeros, false>(sum, row, column)
                                                   : store_gated_rows<kZeros, true>(sum, row, column);
            } else {
                args.plain ? store_rows<true, kZeros>(sum, row, column) : store_rows<false, kZeros>(sum, row, column);
            }
        } else {
            args.gated   ? store_gated_columns(sum, column, row)
            : args.plain ? store_columns<true>(sum, column, row)
                         : store_columns<false>(sum, column, row);
        }
    }

    __device__ __forceinline__ void store(const Sum (&sum)[kSums], const MatmulPlace& place) {
        const int row = first_row(place), column = place.b * kN;
        if constexpr (kTokensAreA && std::is_same_v<T, int8_t>) {
            args.token_zeros == nullptr ? store_tile<false>(sum, row, column) : store_tile<true>(sum, row, column);
        } else {
            store_tile<false>(sum, row, column);
        }
    }

    __device__ __forceinline__ void run() {
        const MatmulSchedule& schedule = args.schedule;
        MatmulWalk walk(schedule, worker);
        MatmulSegment segment;
        while (walk.next(schedule, segment)) {
            load_scales(schedule.place(segment.tile));
            Sum sum[kSums];
            this->multiply_segment(sum, segment.end - segment.begin, args.gated);
            if (segment.end - segment.begin == schedule.chunks || add_parts(sum, segment)) {
                store(sum, schedule.place(static_cast<int>(keep(segment.tile))));  // no register through the product
            }
        }
        if (threadIdx.x % 128 == 0) {
            tma_store_wait();
        }
    }
};

}  // namespace
}  // namespace fastkernels
