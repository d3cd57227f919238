// The queries of attention_decode: from memory to the operands of mma, in the order that the keys come in.
#pragma once

#include "attention/as_fp16.cuh"
#include "attention/attention_decode_keys.cuh"

namespace fastkernels {
namespace {

// What a lane holds of q as the B operand, a row a column: dimensions [16 d, 16 d + 16) of row lane / 4 of tile i, in
// the order that the keys come in. All loads are issued before the first is waited for.
template <typename KV, int D, int kTiles>
struct Queries {
    static constexpr bool kShared = kSharesQueries<KV, D, kTiles>;
    static constexpr int kOwn = kShared ? 1 : kTiles;  // row tiles a warp loads: all, or one to share
    uint2 pieces[kOwn][D / 16];

    __device__ __forceinline__ void load(const AttentionMmaArgs& a, const Work& work, int kv_head, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int row = (kShared ? warp % kTiles : i) * 8 + lane / 4;
            const bool valid = row < work.rows;
            const int64_t offset = row_of_q(a, work, kv_head, valid ? row : 0);
            if (is_bytes(a)) {
                const auto* q = static_cast<const unsigned char*>(a.p.q) + offset + lane % 4 * 4;
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    pieces[i][d].x = valid ? *reinterpret_cast<const uint32_t*>(q + d * 16) : 0;
                }
            } else {
                const auto* q = static_cast<const uint16_t*>(a.p.q) + offset;
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint2 x = make_uint2(0, 0);
                    if constexpr (kIsByte<KV>) {
                        if (valid) {
                            x = *reinterpret_cast<const uint2*>(q + d * 16 + lane % 4 * 4);
                        }
                    } else if (valid) {
                        x.x = *reinterpret_cast<const uint32_t*>(q + d * 16 + lane % 4 * 2);
                        x.y = *reinterpret_cast<const uint32_t*>(q + d * 16 + lane % 4 * 2 + 8);
                    }
                    pieces[i][d] = x;
                }
            }
        }
    }

    // To the dtype of the products.
    __device__ __forceinline__ void convert(const AttentionMmaArgs& a) {
        if constexpr (kIsByte<KV>) {
            const auto each = [&](auto convert) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                    for (int d = 0; d < D / 16; ++d) {
                        convert(pieces[i][d]);
                    }
                }
            };
            if (is_bytes(a)) {
                each([](uint2& x) { unpack_bytes<e4m3, false>(x.x, x.x, x.y); });
            } else if (a.p.dtype == DType::bf16) {
                each([](uint2& x) { x = make_uint2(as_fp16(x.x), as_fp16(x.y)); });
            }
        }
    }

    static __device__ bool is_bytes(const AttentionMmaArgs& a) {
        return std::is_same_v<KV, e4m3> && a.p.q_dtype == DType::e4m3;
    }
};

}  // namespace
}  // namespace fastkernels
