// The shape of attention_fp8_sm90, and what its warps share.
#pragma once

#include "attention/attention_fp8_sm90.h"
#include "attention/attention_sm90_shared.cuh"

namespace fastkernels {
namespace {

struct Fp8Shape {
    static constexpr int kHeadDim = 128;
    static constexpr bool kWidens = false;  // bytes are multiplied as they come
    static constexpr int kConsumers = 2;    // warpgroups
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kRows = 64 * kConsumers;
    static constexpr int kKeys = 192;  // of a block, three times 64
    static constexpr int kParts = kKeys / 64;
    static constexpr int kPanelColumns = 128;
    static constexpr int kPanels = 1;
    static constexpr int kQBytes = kRows * kHeadDim;
    static constexpr int kSlotBytes = kKeys * kHeadDim;  // a block of K, of V, of V transposed
    static constexpr int kQSlots = 2;
    static constexpr int kSlots = 3;        // of K and of V
    static constexpr int kTurnedSlots = 2;  // of V transposed
    static constexpr int kTurners = 2;      // warps that transpose
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = 232;
};
static_assert(Fp8Shape::kRows == prefill_rows_sm90(Fp8Shape::kHeadDim, 1));
static_assert(Fp8Shape::kConsumers == Sm90Shape<Fp8Shape::kHeadDim>::kConsumers);  // combine_if_last

struct Fp8Shared {
    using Shape = Fp8Shape;
    alignas(1024) unsigned char q[Shape::kQSlots][Shape::kQBytes];
    alignas(1024) unsigned char keys[2][Shape::kSlots][Shape::kSlotBytes];  // K, V
    alignas(1024) unsigned char turned[Shape::kTurnedSlots][Shape::kSlotBytes];
    uint64_t full[2][Shape::kSlots], empty[2][Shape::kSlots];
    uint64_t turned_full[Shape::kTurnedSlots], turned_empty[Shape::kTurnedSlots];
    uint64_t tile_full[Shape::kQSlots], q_full[Shape::kQSlots], q_empty[Shape::kQSlots];
    Tile tiles[Shape::kQSlots];
    WorkItem item;  // of the tile that warp 0 prepares
    int last;       // whether this block combines the tile's splits
};

}  // namespace
}  // namespace fastkernels
