// What the warps of an attention_sm90 block share: its memory, its barriers, and what they say of a tile.
#pragma once

#include "attention/attention_sm90_args.h"

namespace fastkernels {
namespace {

// What the producer tells the consumers about a tile.
struct Tile {
    int rows;         // 0: there are no more tiles
    int first_token;  // of q and out
    int kv_head;
    int first_position, last_position;  // of its tokens in the sequence
    int begin, end, num_blocks;         // of keys; at least one block, which may be empty
    int split, num_splits, partial_row, counter;
    int seq, k_begin, len_k;
    float k_scale;  // where keys are widened
};

template <typename SharedShape>
struct Sm90Shared {
    using Shape = SharedShape;
    alignas(1024) unsigned char q[Shape::kQSlots][Shape::kQBytes];
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];
    uint64_t tile_full[Shape::kQSlots], q_full[Shape::kQSlots], q_empty[Shape::kQSlots];
    uint64_t landed[Shape::kLoaders];  // a block that its loader is to change before it is full
    uint64_t q_landed;                 // likewise Q
    Tile tiles[Shape::kQSlots];
    WorkItem item;  // of the tile that warp 0 prepares
    int last;       // whether this block combines the tile's splits
};

// Lanes of a consumer warp that say it has done with a tile. One would do after __syncwarp(), and has to where
// registers are short; but compute-sanitizer's racecheck only sees the order of what the arriving lane did itself.
template <typename Shape, bool kSoftCap>
constexpr int kLanesArrive = Shape::kHeadDim == 64 && kSoftCap && !Shape::kWidens ? 1 : 32;

// Named barriers: 0 is __syncthreads.
constexpr int kTurnBarrier = 1;       // and the next ones: a consumer warpgroup's turn to issue
constexpr int kGroupBarrier = 4;      // and the next ones: the four warps of a consumer warpgroup
constexpr int kConsumersBarrier = 7;  // all consumers

// A place in a ring and the parity of its phase.
template <int kSlots>
struct Place {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        advance(1);
    }
    __device__ __forceinline__ void advance(int steps) {
        slot += steps;
        if (slot >= kSlots) {
            slot -= kSlots;
            parity ^= 1;
        }
    }
};

}  // namespace
}  // namespace fastkernels
