// Which tile, and which part of K, each worker of matmul_sm90 takes when. Constexpr, for the GPU and for tests without.
//
// A worker is a cluster. The first split_tiles tiles are cut along K, and are taken first; the others are taken whole,
// in turn. A tile that is cut is added up from its parts, in their order. There are two ways to cut:
//   stream-K  the tiles that are cut are one row of chunks, cut into equal shares, one a worker, wherever the cuts
//             fall. Everybody has the same to do, but no two read the same rows at the same time.
//   slices    each tile is cut into the same few slices, and all first slices are taken before all second ones: who
//             works at the same time reads the same columns of K, and finds in L2 what a neighbour has read.
// Source: Osama et al. 2023 (Stream-K).
#pragma once

#include <cstdint>

namespace fastkernels {

// Chunks [begin, end) of K of a tile, which are this part of it.
struct MatmulSegment {
    int tile, part, begin, end;
};

struct MatmulPlace {
    int a, b;  // along the rows of A, in clusters' tiles, and of B
};

struct MatmulSchedule {
    int a_tiles, b_tiles;
    int chunks;       // of a tile
    int workers;      // at most as many as split_tiles have parts, where there are any
    int split_tiles;  // at most 2 a worker; times chunks, less than 2^31
    int slices;       // of each of split_tiles, which have at most 2 a worker; 0: stream-K
    int group;        // tiles along A that are walked together, so that what they read of B stays in L2

    constexpr int tiles() const {
        return a_tiles * b_tiles;
    }
    // stream-K: the first of a worker's share of the chunks of the split tiles.
    constexpr int64_t share_begin(int worker) const {
        return split_tiles == 0 ? 0 : static_cast<int64_t>(worker) * split_tiles * chunks / workers;
    }
    // stream-K: the worker whose share a chunk is in.
    constexpr int worker_of(int64_t unit) const {
        return static_cast<int>(((unit + 1) * workers - 1) / (static_cast<int64_t>(split_tiles) * chunks));
    }
    constexpr int first_worker(int tile) const {
        return worker_of(static_cast<int64_t>(tile) * chunks);
    }
    // Of a tile that is cut.
    constexpr int parts(int tile) const {
        return slices > 0 ? slices : worker_of(static_cast<int64_t>(tile + 1) * chunks - 1) - first_worker(tile) + 1;
    }
    // Where the workspace has a part, of 2 * workers places. In stream-K a worker has at most one that begins a tile.
    constexpr int slot(int tile, int part) const {
        return slices > 0 ? part * split_tiles + tile : (first_worker(tile) + part) * 2 + (part == 0 ? 1 : 0);
    }
    constexpr MatmulPlace place(int tile) const {
        const int first = tile / (group * b_tiles) * group, index = tile % (group * b_tiles);
        const int rows = a_tiles - first < group ? a_tiles - first : group;
        return {first + index % rows, index / rows};
    }
};

// The segments of a worker, in order.
struct MatmulWalk {
    int worker, tile;  // tile: the next whole one
    int unit;          // of chunks (stream-K), or of slices, every workers-th of which is this one's

    constexpr MatmulWalk(const MatmulSchedule& s, int worker)
        : worker(worker),
          tile(s.split_tiles + worker),
          unit(s.slices > 0 ? worker : static_cast<int>(s.share_begin(worker))) {
    }

    // The next one; false when there are no more.
    constexpr bool next(const MatmulSchedule& s, MatmulSegment& segment) {
        // Not kept from one segment to the next, since the consumers have no register to spare.
        const int end = s.slices > 0 ? s.split_tiles * s.slices : static_cast<int>(s.share_begin(worker + 1));
        if (unit >= end) {
            segment = {tile, 0, 0, s.chunks};
            tile += s.workers;
            return segment.tile < s.tiles();
        }
        if (s.slices > 0) {
            const int slice = unit / s.split_tiles;
            segment = {unit % s.split_tiles, slice, slice * s.chunks / s.slices, (slice + 1) * s.chunks / s.slices};
            unit += s.workers;
        } else {
            segment.tile = unit / s.chunks;
            segment.part = worker - s.first_worker(segment.tile);
            segment.begin = unit - segment.tile * s.chunks;
            const int rest = end - unit;
            segment.end = rest < s.chunks - segment.begin ? segment.begin + rest : s.chunks;
            unit += segment.end - segment.begin;
        }
        return true;
    }
};

enum class MatmulCut { none, stream_k, slices };

// chunks of K in all tiles: shared out over at most max_workers, in whole tiles or, where these do not come out even,
// with some of them cut: by stream-K all but whole rounds, in slices the last, incomplete round.
constexpr MatmulSchedule matmul_schedule(int a_tiles, int b_tiles, int chunks, int max_workers, int group,
                                         MatmulCut cut) {
    constexpr int kLeastShare = 4;  // chunks: less is not worth a partial sum
    const int tiles = a_tiles * b_tiles, rest = tiles % max_workers;
    MatmulSchedule s{a_tiles, b_tiles, chunks, tiles < max_workers ? tiles : max_workers, 0, 0, group};
    if (cut == MatmulCut::stream_k && rest != 0) {
        const int64_t most = (static_cast<int64_t>(tiles) * chunks + kLeastShare - 1) / kLeastShare;
        s.workers = most < max_workers ? static_cast<int>(most) : max_workers;
        const int rounds = tiles / s.workers;
        s.split_tiles = rounds > 1 ? tiles - (rounds - 1) * s.workers : tiles;
    }
    if (cut == MatmulCut::slices && rest != 0) {
        // What the busiest worker multiplies, in chunks, and 2 chunks' time for each part that is added up.
        int best = 1, least = chunks;
        for (int slices = 2; slices <= chunks / kLeastShare && rest * slices <= 2 * max_workers; ++slices) {
            const int units = (rest * slices + max_workers - 1) / max_workers;
            const int cost = units * ((chunks + slices - 1) / slices) + 2 * slices;
            if (cost < least) {
                best = slices;
                least = cost;
            }
        }
        if (best > 1) {
            s.slices = best;
            s.split_tiles = rest;
            s.workers = tiles < max_workers && rest * best < max_workers ? rest * best : max_workers;
        }
    }
    return s;
}

}  // namespace fastkernels
