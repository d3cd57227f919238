// What the roles of matmul_sm90 share: sizes, shared memory, the way round the ring.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/matmul_sm90.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

template <typename T, MatmulScales kScales, bool kTokensAreA, int kN, int kCluster>
struct MatmulShape {
    static constexpr int kConsumers = 2;  // warpgroups
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kElements = 128 / static_cast<int>(sizeof(T));  // of a chunk
    static constexpr int kABytes = kMatmulRows * 128, kBBytes = kN * 128, kSlotBytes = kABytes + kBBytes;
    // Of out, as a warpgroup hands it to TMA: panels of 64 elements, of a gate 32, two in turn.
    static constexpr int kPanels = kTokensAreA ? 2 : 1;
    static constexpr int kPanelBytes = (kTokensAreA ? 64 : kN) * 128;
    static constexpr int kOutBytes = kConsumers * kPanels * kPanelBytes;
    // Scales of blocks, of a chunk: of the tile's tokens, and of the weight's rows. These are in one block of 128, but
    // 192 of them in two; each 64 have theirs.
    static constexpr bool kByBlock = kScales == MatmulScales::block;
    static constexpr int kTokens = kTokensAreA ? kMatmulRows : kN;
    static constexpr int kPieces = kTokensAreA && kN == 192 ? 3 : 1;
    static constexpr int kChunkScales = kByBlock ? kTokens + 4 : 0;
    // Of D's columns, and of a warpgroup's rows.
    static constexpr int kTileScales = kScales == MatmulScales::channel ? kN + 64 : 0;
    static constexpr int kMostBytes = 227 * 1024;
    static constexpr int kSlots =
        (kMostBytes - 512 - kOutBytes - kConsumers * kTileScales * 4) / (kSlotBytes + kChunkScales * 4);
    // 65,536 a block
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

template <typename Shape>
struct MatmulShared {
    alignas(1024) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];  // A, then B
    alignas(1024) unsigned char out[Shape::kConsumers][Shape::kPanels * Shape::kPanelBytes];
    alignas(16) float chunk_scales[std::max(1, Shape::kSlots* Shape::kChunkScales)];  // of tokens, then of the weight
    alignas(16) float tile_scales[std::max(1, Shape::kConsumers* Shape::kTileScales)];
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];              // in this order
    int is_last[Shape::kConsumers], others_done[Shape::kConsumers];  // of a tile that is cut
};

// A place in the ring and the parity of its phase.
template <int kSlots>
struct RingPlace {
    static constexpr bool kCounts = (kSlots & (kSlots - 1)) == 0;  // fewer instructions, where it can be done
    uint32_t at = 0, flips = 0;

    __device__ __forceinline__ uint32_t slot() const {
        return kCounts ? at % kSlots : at;
    }
    __device__ __forceinline__ uint32_t parity() const {
        return kCounts ? at / kSlots % 2 : flips;
    }
    __device__ __forceinline__ void next() {
        ++at;
        if (!kCounts && at == kSlots) {
            at = 0;
            flips ^= 1;
        }
    }
};

}  // namespace
}  // namespace fastkernels
