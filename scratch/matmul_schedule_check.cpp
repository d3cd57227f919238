// Every chunk of every tile is taken once, in order; parts, counters and contributors agree with the walks.
// g++ -std=c++20 -O2 -Icsrc scratch/matmul_schedule_check.cpp -o /tmp/check && /tmp/check
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "gemm/matmul_sm90_schedule.h"
using namespace fastkernels;

#define REQUIRE(x) do { if (!(x)) { std::printf("%s: a %d b %d chunks %d workers %d split %d\n", #x, a, b, chunks, s.workers, s.split_tiles); std::exit(1); } } while (0)

int main() {
    long cases = 0, parts = 0, most = 0;
    for (int max_workers : {1, 2, 3, 66, 132}) for (int a = 1; a < 300; a = a < 20 ? a + 1 : a * 3 / 2) for (int b : {1, 2, 3, 7, 24, 112})
        for (int chunks : {1, 2, 3, 4, 5, 32, 64, 112, 224}) for (bool split : {false, true}) for (int group : {8, 16}) {
            const MatmulSchedule s = matmul_schedule(a, b, chunks, max_workers, group, split);
            REQUIRE(s.workers >= 1 && s.workers <= max_workers && s.split_tiles <= s.tiles() && s.split_tiles <= 2 * max_workers);
            REQUIRE(s.split_tiles == 0 || (long)s.split_tiles * chunks >= s.workers);
            std::set<std::pair<int, int>> places;
            for (int t = 0; t < s.tiles(); ++t) { auto p = s.place(t); REQUIRE(p.a >= 0 && p.a < a && p.b >= 0 && p.b < b); places.insert({p.a, p.b}); }
            REQUIRE((int)places.size() == s.tiles());
            std::vector<std::vector<char>> seen(s.tiles(), std::vector<char>(chunks));
            std::vector<std::vector<std::pair<int, int>>> who(s.tiles());
            for (int w = 0; w < s.workers; ++w) {
                MatmulWalk walk(s, w); MatmulSegment g; int slots[2] = {0, 0};
                while (walk.next(s, g)) {
                    REQUIRE(g.tile < s.tiles() && g.begin < g.end && g.end <= chunks);
                    for (int c = g.begin; c < g.end; ++c) { REQUIRE(!seen[g.tile][c]); seen[g.tile][c] = 1; }
                    if (g.end - g.begin < chunks) {
                        const int slot = w == s.first_worker(g.tile) ? 1 : 0;
                        REQUIRE(slot == (g.begin == 0)); REQUIRE(++slots[slot] == 1);
                        who[g.tile].push_back({w, slot}); ++parts;
                    } else if (g.tile < s.split_tiles) { REQUIRE(s.first_worker(g.tile) == w && s.last_worker(g.tile) == w); }
                }
            }
            for (int t = 0; t < s.tiles(); ++t) {
                for (char c : seen[t]) REQUIRE(c);
                if (!who[t].empty()) {
                    const int first = s.first_worker(t), last = s.last_worker(t);
                    REQUIRE((int)who[t].size() == last - first + 1);
                    for (int i = 0; i < (int)who[t].size(); ++i) REQUIRE(who[t][i].first == first + i && who[t][i].second == (i == 0));
                    most = std::max<long>(most, last - first + 1);
                }
            }
            ++cases;
        }
    // Swizzle and descriptors: rows of 128 bytes, element (r, c) of a panel at r * 128 + ((c / 16) ^ (r % 8)) * 16 + c % 16; no two alike.
    std::set<int> at;
    for (int r = 0; r < 64; ++r) for (int piece = 0; piece < 8; ++piece) at.insert(r * 128 + (piece ^ (r % 8)) * 16);
    if (at.size() != 512) return 1;
    // stmatrix of D's rows (store_rows) and of D transposed (store_columns): every 16-byte piece of the panels written once, with the right element.
    for (int kN : {32, 64, 128, 256}) {
        std::vector<int> panel(2 * 64 * 8, -1);  // rows: [panel][row][piece] = column of 8 * ...
        for (int warp = 0; warp < 4; ++warp) for (int i = 0; i < 8; ++i) for (int lane = 0; lane < 32; ++lane) {
            const int address = i / 4 * 8192 + (warp * 16 + lane % 16) * 128 + ((i % 4 * 2 + lane / 16) ^ lane % 8) * 16;
            const int row = warp * 16 + lane % 16, column = i * 16 + lane / 16 * 8;  // what matrix lane / 8 holds
            const int matrix = lane / 8, expect_row = warp * 16 + matrix % 2 * 8 + lane % 8, expect_column = i * 16 + matrix / 2 * 8;
            if (row != expect_row || column != expect_column) return 2;
            const int tma = column / 64 * 8192 + row * 128 + ((column % 64 / 8) ^ (row % 8)) * 16;
            if (tma != address || panel[address / 16] != -1) return 3;
            panel[address / 16] = column;
        }
        std::vector<int> columns(kN * 8, -1);
        for (int warp = 0; warp < 4; ++warp) for (int i = 0; i < kN / 16; ++i) for (int lane = 0; lane < 32; ++lane) {
            const int address = (i * 16 + lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
            const int matrix = lane / 8;  // pairs[tile * 2 + half]: tokens 8 * (2i + tile) + lane % 8, weight rows warp * 16 + half * 8
            const int token = 8 * (2 * i + matrix / 2) + lane % 8, row = warp * 16 + matrix % 2 * 8;
            const int tma = token * 128 + ((row / 8) ^ (token % 8)) * 16;
            if (tma != address || columns[address / 16] != -1) return 4;
            columns[address / 16] = row;
        }
    }
    std::printf("%ld schedules, %ld parts, at most %ld of a tile: all covered once\n", cases, parts, most);
}
