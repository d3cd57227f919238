// The producer of attention_fp8_sm90, but for its first warp, which is attention_sm90's: one warp loads K and V, two
// turn V over.
#pragma once

#include "attention/attention_fp8_sm90_shared.cuh"
#include "common/ptx/byte_types.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"

namespace fastkernels {
namespace {

// Warp 1: K and V of every block, the last block first. A lane loads a box of each.
__device__ __forceinline__ void produce_fp8_keys(const Sm90Args& args, Fp8Shared& shared) {
    using Shape = Fp8Shape;
    constexpr int kKeys = Shape::kKeys;
    const AttentionMmaArgs& a = args.a;
    const AttentionParams& p = a.p;
    const int lane = threadIdx.x % 32, box_shift = args.box_shift, box_key = lane << box_shift;
    const bool paged = p.page_size > 0;

    Place<Shape::kQSlots> tile_place;
    Place<Shape::kSlots> place;
    for (;; tile_place.next()) {
        mbarrier_wait(shared_address(&shared.tile_full[tile_place.slot]), tile_place.parity);
        const Tile& tile = shared.tiles[tile_place.slot];
        if (tile.rows == 0) {
            break;
        }
        const int32_t* pages = paged ? p.page_table + tile.seq * p.page_table_seq_stride : nullptr;
        const auto look_up = [&](int block) {  // the row of this lane's boxes
            const int key = tile.begin + block * kKeys + box_key;
            if (!paged) {
                return tile.k_begin + key;
            }
            if (block < 0 || key >= tile.len_k || box_key >= kKeys) {
                return 0;
            }
            return static_cast<int>(static_cast<uint32_t>(pages[(key >> a.page_shift) * p.page_table_page_stride]) *
                                        a.page_rows +
                                    tile.kv_head * p.page_size + (key & (p.page_size - 1)));
        };
        int row = look_up(tile.num_blocks - 1);
#pragma unroll 1
        for (int block = tile.num_blocks - 1; block >= 0; --block) {
            const int next_row = look_up(block - 1);
            const int keys = tile.len_k - (tile.begin + block * kKeys);  // that the sequence has from here on
            const int boxes = max(0, min(kKeys, keys + (1 << box_shift) - 1)) >> box_shift;
#pragma unroll
            for (int is_v = 0; is_v < 2; ++is_v) {
                const uint32_t full = shared_address(&shared.full[is_v][place.slot]);
                mbarrier_wait(shared_address(&shared.empty[is_v][place.slot]), place.parity ^ 1);
                if (lane == 0) {
                    mbarrier_arrive_expect_bytes(full, boxes << box_shift << 7);
                }
                __syncwarp();
                if (lane < boxes) {
                    tma_load(shared_address(shared.keys[is_v][place.slot]) + box_key * 128,
                             is_v ? args.v_map : args.k_map, 0, paged ? 0 : tile.kv_head, row, full);
                }
            }
            row = next_row;
            place.next();
        }
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        }
    }
}

// Warps 2 and 3: V of every block, transposed, 64 of its dimensions each. Of 16 dimensions the even ones make the first
// 8 rows; of 16 keys a row has 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. Keys past the end become zeros, since 0 x NaN is
// NaN and other sequences' or stale keys may lie there.
__device__ __forceinline__ void turn_values(const Sm90Args& args, Fp8Shared& shared, int half) {
    using Shape = Fp8Shape;
    constexpr int kKeys = Shape::kKeys, kHeadDim = Shape::kHeadDim, kChunks = kHeadDim / 16 / Shape::kTurners;
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    // Lane addresses within a slot (common/ptx/ldmatrix.cuh): read are 32 keys of 16 dimensions, written are the even
    // and the odd dimensions of the first 16 keys, then of the others.
    uint32_t read[kChunks], write[2];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        read[chunk] = lane * 128 + ((half * kChunks + chunk) ^ r) * 16;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        write[i] = (half * kChunks * 16 + matrix % 2 * 8 + r) * 64 + ((i * 2 + matrix / 2) ^ r / 2) * 16;
    }

    Place<Shape::kQSlots> tile_place;
    Place<Shape::kSlots> place;
    Place<Shape::kTurnedSlots> turned_place;
    for (;; tile_place.next()) {
        mbarrier_wait(shared_address(&shared.tile_full[tile_place.slot]), tile_place.parity);
        const Tile& tile = shared.tiles[tile_place.slot];
        if (tile.rows == 0) {
            break;
        }
#pragma unroll 1
        for (int block = tile.num_blocks - 1; block >= 0; --block) {
            const int keys = tile.len_k - (tile.begin + block * kKeys);
            const uint32_t from = shared_address(shared.keys[1][place.slot]);
            const uint32_t to = shared_address(shared.turned[turned_place.slot]);
            mbarrier_wait(shared_address(&shared.full[1][place.slot]), place.parity);
            mbarrier_wait(shared_address(&shared.turned_empty[turned_place.slot]), turned_place.parity ^ 1);
            const auto turn = [&](auto clears) {
#pragma unroll
                for (int j = 0; j < kKeys / 32 * kChunks; j += 2) {  // two at a time: registers are scarce
                    uint32_t pairs[2][4];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        ldmatrix_x4_trans(pairs[e], from + read[(j + e) % kChunks] + (j + e) / kChunks * (32 * 128));
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int i = (j + e) / kChunks, chunk = (j + e) % kChunks;
                        uint32_t (&x)[4] = pairs[e];
                        if constexpr (decltype(clears)::value) {
#pragma unroll
                            for (int m = 0; m < 4; ++m) {
                                const int left = keys - (i * 32 + m * 8 + lane % 4 * 2);
                                x[m] &= left >= 2 ? 0xffffffffu : left == 1 ? 0x0000ffffu : 0u;
                            }
                        }
                        stmatrix_x4(to + i / 2 * (kHeadDim * 64) + write[i % 2] + chunk * (16 * 64),
                                    permute_bytes(x[0], x[1], 0x6420), permute_bytes(x[0], x[1], 0x7531),
                                    permute_bytes(x[2], x[3], 0x6420), permute_bytes(x[2], x[3], 0x7531));
                    }
                }
            };
            if (keys >= kKeys) {
                turn(std::false_type{});
            } else {
                turn(std::true_type{});
            }
            fence_async_shared();
            __syncwarp();
            if (lane == 0) {
                mbarrier_arrive(shared_address(&shared.empty[1][place.slot]));
                mbarrier_arrive(shared_address(&shared.turned_full[turned_place.slot]));
            }
            place.next();
            turned_place.next();
        }
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty[tile_place.slot]));
        }
    }
}

}  // namespace
}  // namespace fastkernels
