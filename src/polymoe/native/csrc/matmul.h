// Many rows of x times a piece of weights, in tiles of rows: see linear.h.
#pragma once

#include <string.h>

#include "amx.h"
#include "problem.h"
#include "threads.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

constexpr int64_t TILE = 12;          // rows of x in a matmul's tile: 12 x 2 sums, 2 weights, 1 row in 32 registers
constexpr int64_t AMX_TILE = 32;      // with AMX: 2 x 2 tiles of sums, 2 of rows, 2 of weights

// A tile of rows of a group: `height` rows from row `first` of the problem, the last `height - rows` of them zero.
struct Tile {
    int64_t first, rows, height;
};

inline bool with_amx() { return amx::chosen() & amx::BF16; }

inline void add_tiles(std::vector<Tile>& tiles, int64_t first, int64_t rows) {
    if (with_amx()) {
        for (int64_t r = 0; r < rows; r += AMX_TILE) {
            const int64_t left = std::min(AMX_TILE, rows - r);
            tiles.push_back({first + r, left, (left + amx::ROWS - 1) / amx::ROWS * amx::ROWS});
        }
        return;
    }
    const int64_t count = (rows + TILE - 1) / TILE, height = (rows + count - 1) / count;  // of equal height
    for (int64_t r = 0; r < rows; r += height) tiles.push_back({first + r, std::min(height, rows - r), height});
}

// packed [in / 2][height] pairs of inputs, so that a pair of all rows lies together; with AMX [height][in / 2].
inline void pack_tile(const Problem& p, const Tile& tile, uint32_t* packed) {
    for (int64_t r = 0; r < tile.height; ++r) {
        const uint32_t* row = r < tile.rows ? reinterpret_cast<const uint32_t*>(p.row(tile.first + r)) : nullptr;
        if (with_amx()) {
            uint32_t* to = packed + r * (p.in / 2);
            row ? memcpy(to, row, p.in * 2) : memset(to, 0, p.in * 2);
        } else {
            for (int64_t k = 0; k < p.in / 2; ++k) packed[k * tile.height + r] = row ? row[k] : 0;
        }
    }
}

// 16 weight rows -> [in / 2][16] pairs; rows past `count` are zero. `stride` in pairs from one k to the next.
inline void pack_weights(const uint16_t* w, int64_t in, int64_t count, uint32_t* packed, int64_t stride) {
    for (int64_t k = 0; k < in; k += 32) {
        __m512i a[16], b[16];
        for (int64_t o = 0; o < 16; ++o) {
            a[o] = o < count ? _mm512_loadu_si512(w + o * in + k) : _mm512_setzero_si512();
            if (o < count) _mm_prefetch(reinterpret_cast<const char*>(w + o * in + k + 64), _MM_HINT_T0);
        }
        // A 16 x 16 transpose of pairs: neighbours, then quads, then 128-bit lanes.
        for (int i = 0; i < 16; i += 4) {
            const __m512i t0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), t1 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            const __m512i t2 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), t3 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
            b[i] = _mm512_unpacklo_epi64(t0, t2), b[i + 1] = _mm512_unpackhi_epi64(t0, t2);
            b[i + 2] = _mm512_unpacklo_epi64(t1, t3), b[i + 3] = _mm512_unpackhi_epi64(t1, t3);
        }
        for (int i = 0; i < 4; ++i) {  // b[i + 4 q] has, in lane l, pair 4 l + i of rows 4 q .. 4 q + 3
            const __m512i lo01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x44), hi01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xee);
            const __m512i lo23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x44), hi23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xee);
            uint32_t* to = packed + (k / 2 + i) * stride;
            _mm512_store_si512(to, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
            _mm512_store_si512(to + 4 * stride, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
            _mm512_store_si512(to + 8 * stride, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
            _mm512_store_si512(to + 12 * stride, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
        }
    }
}

// The sums of row r of the problem for `count` outputs from o on -> y. When paired they are 16 of each half.
inline void finish_row(const Problem& p, int64_t r, const uint16_t* bias, int64_t o, int64_t count, __m512 one, __m512 two) {
    uint16_t* y = p.y + r * p.out + o;
    if (p.paired) return store_bf16(y, gated(round_bf16(one), round_bf16(two)), count);
    for (int half = 0; half < 2 && count > 16 * half; ++half) {
        __m512 total = half ? two : one;
        if (bias) total = _mm512_add_ps(total, load_bf16(bias + 16 * half, count - 16 * half));
        store_bf16(y + 16 * half, total, count - 16 * half);
    }
}

// Weights of the piece after this one, which are fetched into L2 while this one is multiplied, in the order in which they
// lie: 16 rows from each of two addresses on. Null: none.
struct NextPiece {
    const uint16_t *first, *second;
};

template <int HEIGHT>
void matmul_tile(const Problem& p, const Tile& tile, const uint32_t* x, const uint32_t* w, const uint16_t* bias,
                 int64_t o, int64_t count, NextPiece next = {}) {
    __m512 sum[HEIGHT][2];
    for (int r = 0; r < HEIGHT; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.in / 2; ++k, x += HEIGHT, w += WEIGHT_ROWS) {
        if (next.first) {
            _mm_prefetch(reinterpret_cast<const char*>(next.first + 32 * k), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(next.second + 32 * k), _MM_HINT_T1);
        }
        const __m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 16);
#pragma GCC unroll 12
        for (int r = 0; r < HEIGHT; ++r) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, w0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, w1);
        }
    }
    for (int64_t r = 0; r < tile.rows; ++r) finish_row(p, tile.first + r, bias, o, count, sum[r][0], sum[r][1]);
}

// The same on AMX for 16 or 32 rows: tiles 0 to 3 are the sums, 4 and 5 rows of x, 6 and 7 weights.
template <bool TWO>
void amx_tile(const Problem& p, const Tile& tile, const uint32_t* x, const uint32_t* w, const uint16_t* bias, int64_t o,
              int64_t count) {
    alignas(64) float sums[AMX_TILE * WEIGHT_ROWS];
    const int64_t row = p.in * 2, sum_row = WEIGHT_ROWS * 4;
    const uint32_t* below = x + amx::ROWS * (p.in / 2);
    amx::zero<0>(), amx::zero<1>();
    if (TWO) amx::zero<2>(), amx::zero<3>();
    for (int64_t k = 0; k < p.in / 2; k += 16) {
        amx::load<4>(x + k, row);
        amx::load<6>(w + k * WEIGHT_ROWS, sum_row);
        amx::load<7>(w + k * WEIGHT_ROWS + 16, sum_row);
        amx::add_bf16<0, 4, 6>(), amx::add_bf16<1, 4, 7>();
        if (TWO) {
            amx::load<5>(below + k, row);
            amx::add_bf16<2, 5, 6>(), amx::add_bf16<3, 5, 7>();
        }
    }
    amx::store<0>(sums, sum_row), amx::store<1>(sums + 16, sum_row);
    float* lower = sums + amx::ROWS * WEIGHT_ROWS;
    if (TWO) amx::store<2>(lower, sum_row), amx::store<3>(lower + 16, sum_row);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const float* at = sums + r * WEIGHT_ROWS;
        finish_row(p, tile.first + r, bias, o, count, _mm512_load_ps(at), _mm512_load_ps(at + 16));
    }
}

// Pairs [in / 2][WEIGHT_ROWS] of `count` outputs from o on; their weights are rows of `first` and, when paired, of `second`.
inline void pack_piece(const Problem& p, const uint16_t* first, const uint16_t* second, int64_t count, uint32_t* packed) {
    if (!p.paired) second = first + 16 * p.in;
    pack_weights(first, p.in, std::min<int64_t>(count, 16), packed, WEIGHT_ROWS);
    pack_weights(second, p.in, p.paired ? count : std::max<int64_t>(0, count - 16), packed + 16, WEIGHT_ROWS);
}

// `count` outputs from o on of the tiles' rows, whose pairs are x, by weights from pack_piece.
inline void matmul(const Problem& p, const Tile* tiles, int64_t num_tiles, const uint32_t* x, const uint32_t* packed,
                   const uint16_t* bias, int64_t o, int64_t count, NextPiece next = {}) {
    for (int64_t t = 0; t < num_tiles; ++t) {
        const NextPiece fetched = t ? NextPiece{} : next;  // one tile is enough
        switch (tiles[t].height) {
#define POLYMOE_HEIGHT(H) \
    case H: matmul_tile<H>(p, tiles[t], x, packed, bias, o, count, fetched); break;
            POLYMOE_HEIGHT(12) POLYMOE_HEIGHT(11) POLYMOE_HEIGHT(10) POLYMOE_HEIGHT(9) POLYMOE_HEIGHT(8) POLYMOE_HEIGHT(7)
            POLYMOE_HEIGHT(6) POLYMOE_HEIGHT(5) POLYMOE_HEIGHT(4) POLYMOE_HEIGHT(3) POLYMOE_HEIGHT(2) POLYMOE_HEIGHT(1)
#undef POLYMOE_HEIGHT
            case 16: amx_tile<false>(p, tiles[t], x, packed, bias, o, count); break;
            case 32: amx_tile<true>(p, tiles[t], x, packed, bias, o, count); break;
        }
        x += tiles[t].height * (p.in / 2);
    }
}

// Memory that is kept from call to call, since fresh pages cost more than filling them.
struct Scratch {
    std::vector<Tile> tiles;
    std::vector<int64_t> first_tile;  // of each group
    std::vector<int64_t> tile_at;     // of each tile: where its pairs start
    std::vector<uint32_t> pairs;
};

// Cut the groups that are `chosen(g)` into tiles.
template <class Chosen>
void make_tiles(const Problem& p, Scratch& scratch, const Chosen& chosen) {
    scratch.tiles.clear();
    scratch.first_tile.assign(1, 0);
    scratch.tile_at.clear();
    int64_t pairs = 0;
    for (int64_t g = 0; g < p.num_groups; ++g) {
        if (chosen(g)) add_tiles(scratch.tiles, p.starts[g], p.rows(g));
        for (size_t t = scratch.tile_at.size(); t < scratch.tiles.size(); ++t) {
            scratch.tile_at.push_back(pairs);
            pairs += scratch.tiles[t].height * (p.in / 2);
        }
        scratch.first_tile.push_back(static_cast<int64_t>(scratch.tiles.size()));
    }
    if (static_cast<int64_t>(scratch.pairs.size()) < pairs) scratch.pairs.resize(pairs);
}

// A piece of a group of many rows, after make_tiles and pack_tiles.
inline void matmul_group(const Problem& p, const Scratch& scratch, int64_t g, const uint32_t* packed,
                         const uint16_t* bias, int64_t o, int64_t count, NextPiece next = {}) {
    const int64_t tile = scratch.first_tile[g];
    matmul(p, scratch.tiles.data() + tile, scratch.first_tile[g + 1] - tile, scratch.pairs.data() + scratch.tile_at[tile],
           packed, bias, o, count, next);
}

inline void pack_tiles(const Problem& p, Scratch& scratch, int num_threads) {
    parallel_for(static_cast<int64_t>(scratch.tiles.size()), 2, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) pack_tile(p, scratch.tiles[t], scratch.pairs.data() + scratch.tile_at[t]);
    });
}

}  // inline namespace
}  // namespace polymoe
