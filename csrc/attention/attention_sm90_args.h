// What the launchers of attention_sm90 and attention_fp8_sm90 hand to their kernels, and the shapes both sides need.
#pragma once

#include <cuda.h>

#include "attention/attention_mma.h"

namespace fastkernels {

struct Sm90Args {
    CUtensorMap q_map;  // [num_tokens, num_q_heads, D] in boxes of [tile_tokens, group, 128 bytes]
    CUtensorMap k_map;  // [rows, num_kv_heads, D] in boxes of [1 << box_shift, 1, 128 bytes]; pages: [rows, 1, D]
    CUtensorMap v_map;
    AttentionMmaArgs a;
    int64_t item_offset;
    int32_t tile_tokens;  // of a tile, tile_tokens * group <= 64 * consumers rows
    float inverse_group;  // 1 / group
    int32_t box_shift;    // log2 of the keys of a box, those of a page or of a block

#ifdef __CUDACC__
    // row / group, of a row of a tile
    __device__ __forceinline__ int token_of(int row) const {
        return static_cast<int>((static_cast<float>(row) + 0.5f) * inverse_group);
    }
#endif
};

struct Sm90Element {  // of q, or of k and v
    CUtensorMapDataType type;
    uint32_t bytes;
};

// block_keys: the most keys of a box
Sm90Args sm90_args(const AttentionMmaArgs& a, Sm90Element q, Sm90Element keys, int block_keys);

// Keys of a block. With head_dim 64 bytes lack the registers for 128.
constexpr int sm90_block_keys(int head_dim, bool widens) {
    return head_dim == 256 || (widens && head_dim == 64) ? 64 : 128;
}

// kWidens: keys and values come as bytes, and lie in the ring as fp16.
template <int D, bool kWidening = false>
struct Sm90Shape {
    static constexpr int kHeadDim = D;
    static constexpr bool kWidens = kWidening;
    static constexpr int kConsumers = D <= 64 ? 3 : 2;  // warpgroups
    static constexpr int kLoaders = 3;                  // warps of the producer that load K and V
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kRows = 64 * kConsumers;
    static_assert(kRows == prefill_rows_sm90(D, 1));
    static constexpr int kKeys = sm90_block_keys(D, kWidens);
    static constexpr int kPanelColumns = 64;
    static constexpr int kPanels = (D + 63) / 64;                      // what a row lacks TMA fills with zeros
    static constexpr int kBoxColumns = kWidens ? 128 : kPanelColumns;  // of a box of keys, 128 bytes
    static constexpr int kBoxPanels = kWidens ? (D + 127) / 128 : kPanels;
    static constexpr int kQBytes = kRows * kPanels * 128;
    static constexpr int kSlotBytes = kKeys * kPanels * 128;  // a block of K or of V
    static constexpr int kQSlots = D <= 128 ? 2 : 1;
    static constexpr int kSlots = D <= 64 ? 1024 / kKeys : 5;
    static constexpr bool kHoldBack = kConsumers == 2;  // see hold_back()
    static constexpr int kSharedBytes = kQSlots * kQBytes + kSlots * kSlotBytes + 1024;
    // Of a thread of each warpgroup together 504, or 512: of a consumer's S takes kKeys / 2, O D / 2 and P kKeys / 4.
    static constexpr int kProducerRegisters = kWidens ? (D == 256 ? 72 : 56) : kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = (504 + 8 * (kConsumers == 3) - kProducerRegisters) / kConsumers / 8 * 8;
};

// T: of out. Keys and values are of T, or with kBytes of one byte.
template <typename T, int D, bool kBytes>
void attention_sm90_head(const Sm90Args& args, int num_blocks, void* stream);

}  // namespace fastkernels
