// Which tile, and which part of K, each worker of matmul_sm90 takes when. Constexpr, for the GPU and for tests without.
//
// A worker is a cluster. The first split_tiles tiles are one row of chunks of K that is cut into equal shares, one a
// worker, wherever the cuts fall (stream-K); the other tiles are taken whole, in turn. A tile that is cut is added up
// from the partial sums of its workers, in their order.
// Source: Osama et al. 2023 (Stream-K).
#pragma once

#include <cstdint>

namespace fastkernels {

// Chunks [begin, end) of K of a tile.
struct MatmulSegment {
    int tile, begin, end;
};

struct MatmulPlace {
    int a, b;  // along the rows of A, in clusters' tiles, and of B
};

struct MatmulSchedule {
    int a_tiles, b_tiles;
    int chunks;       // of a tile
    int workers;      // at most as many as split_tiles have chunks, where there are any
    int split_tiles;  // at most 2 a worker
    int group;        // tiles along A that are walked together, so that what they read of B stays in L2

    constexpr int tiles() const {
        return a_tiles * b_tiles;
    }
    // The first of a worker's share of the chunks of the split tiles.
    constexpr int64_t share_begin(int worker) const {
        return static_cast<int64_t>(worker) * split_tiles * chunks / workers;
    }
    // The worker whose share a chunk is in.
    constexpr int worker_of(int64_t unit) const {
        return static_cast<int>(((unit + 1) * workers - 1) / (static_cast<int64_t>(split_tiles) * chunks));
    }
    constexpr int first_worker(int tile) const {
        return worker_of(static_cast<int64_t>(tile) * chunks);
    }
    constexpr int last_worker(int tile) const {
        return worker_of(static_cast<int64_t>(tile + 1) * chunks - 1);
    }
    constexpr MatmulPlace place(int tile) const {
        const int first = tile / (group * b_tiles) * group, index = tile % (group * b_tiles);
        const int rows = a_tiles - first < group ? a_tiles - first : group;
        return {first + index % rows, index / rows};
    }
};

// The segments of a worker, in order. Of the tiles that are cut, a worker has at most one that it begins (partial 1)
// and one that an earlier worker begins (partial 0).
struct MatmulWalk {
    int64_t unit, end;
    int tile;

    constexpr MatmulWalk(const MatmulSchedule& s, int worker)
        : unit(s.share_begin(worker)), end(s.share_begin(worker + 1)), tile(s.split_tiles + worker) {
    }

    // The next one; false when there are no more.
    constexpr bool next(const MatmulSchedule& s, MatmulSegment& segment) {
        if (unit < end) {
            segment.tile = static_cast<int>(unit / s.chunks);
            segment.begin = static_cast<int>(unit - static_cast<int64_t>(segment.tile) * s.chunks);
            const int64_t rest = end - unit;
            segment.end = rest < s.chunks - segment.begin ? segment.begin + static_cast<int>(rest) : s.chunks;
            unit += segment.end - segment.begin;
            return true;
        }
        segment = {tile, 0, s.chunks};
        tile += s.workers;
        return segment.tile < s.tiles();
    }
};

// chunks of K in all tiles: shared out over at most max_workers, either whole tiles or, if split, all but whole rounds.
constexpr MatmulSchedule matmul_schedule(int a_tiles, int b_tiles, int chunks, int max_workers, int group, bool split) {
    const int tiles = a_tiles * b_tiles;
    MatmulSchedule s{a_tiles, b_tiles, chunks, tiles < max_workers ? tiles : max_workers, 0, group};
    if (split && tiles % max_workers != 0) {
        constexpr int64_t kLeastShare = 4;  // chunks: less is not worth a partial sum
        const int64_t most = (static_cast<int64_t>(tiles) * chunks + kLeastShare - 1) / kLeastShare;
        s.workers = most < max_workers ? static_cast<int>(most) : max_workers;
        const int rounds = tiles / s.workers;
        s.split_tiles = rounds > 1 ? tiles - (rounds - 1) * s.workers : tiles;
    }
    return s;
}

}  // namespace fastkernels
