// Rows of x times the weights of their group, in bfloat16 with float32 sums: what grouped_linear.cpp and experts.cpp share.
//
// Weights lie as stored, [outputs, inputs] row-major. One piece of work is a group and WEIGHT_ROWS rows of its weight.
// With few rows of x (decode) the aim is to stream the weights at the memory's speed: `dots` walks a tile of rows and
// weights along the inputs and adds up lanes at the end. With more (prefill) arithmetic is the limit: the piece is
// repacked once so that 16 outputs lie side by side, and `matmul` keeps a tile of 12 rows by 32 outputs in registers.
#pragma once

#include <algorithm>
#include <vector>

#include "bf16.h"
#include "threads.h"

namespace polymoe {

constexpr int64_t WEIGHT_ROWS = 32;  // of one piece: 32 x 1024 bfloat16 are 64 KiB, well inside L2
constexpr int64_t TILE = 12;         // rows of x in a matmul's tile: 12 x 2 sums, 2 weights, 1 row in 32 registers
constexpr int64_t FEW_ROWS = 32;     // up to here `dots` is faster (measured on Zen 4)

// G groups of rows of x [*, in]; group g has rows starts[g] .. starts[g + 1] of y [*, out].
// Row r of the problem is row row_of[r] of x, or r itself when row_of is null.
// paired: weights[g] is [2 * out, in], and y = silu(first half) * second half, as transformers' gated experts have it.
struct Problem {
    const uint16_t* x;
    const int64_t* row_of;
    int64_t in, out, num_groups;
    const int64_t* starts;
    const uint16_t* const* weights;
    const uint16_t* const* biases;  // [out] a group, or null; null when paired
    bool paired;
    uint16_t* y;

    const uint16_t* row(int64_t r) const { return x + (row_of ? row_of[r] : r) * in; }
    int64_t rows(int64_t g) const { return starts[g + 1] - starts[g]; }
    int64_t outputs_a_piece() const { return paired ? WEIGHT_ROWS / 2 : WEIGHT_ROWS; }
};

// silu(gate) * up, both already rounded to bfloat16, with a rounding between as in torch.
inline __m512 gated(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp_negative(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate)));
    const __mmask16 positive = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_GE_OQ);
    const __m512 sigmoid = _mm512_div_ps(_mm512_mask_blend_ps(positive, e, one), _mm512_add_ps(one, e));
    return _mm512_mul_ps(round_bf16(_mm512_mul_ps(gate, sigmoid)), up);
}

// --- few rows

// sum[r * NR + o] += x[r] . w[o], lane by lane. ahead: how far behind the first FETCHED of w the weights lie that are
// fetched meanwhile.
template <int MR, int NR, int FETCHED = 0>
inline __attribute__((always_inline)) void add_products(const uint16_t* const* x, const uint16_t* const* w, int64_t in,
                                                        int64_t ahead, __m512* sum) {
    static_assert(MR * NR <= 16, "one sum a lane at the end");
    for (int64_t k = 0; k < in; k += 32) {
        __m512bh weight[NR];
        for (int o = 0; o < NR; ++o) weight[o] = (__m512bh)_mm512_loadu_si512(w[o] + k);
        for (int o = 0; o < FETCHED; ++o) _mm_prefetch(reinterpret_cast<const char*>(w[o] + ahead + k), _MM_HINT_T0);
        for (int r = 0; r < MR; ++r) {
            const __m512bh row = (__m512bh)_mm512_loadu_si512(x[r] + k);
            for (int o = 0; o < NR; ++o) sum[r * NR + o] = _mm512_dpbf16_ps(sum[r * NR + o], row, weight[o]);
        }
    }
}

// Sums of MR rows and NR weight rows -> y, `stride` apart. Paired: weight rows are gate, up, gate, up, … and NR / 2 outputs.
template <int MR, int NR, bool PAIRED>
inline __attribute__((always_inline)) void store_tile(const __m512* sum, const uint16_t* bias, uint16_t* y,
                                                      int64_t stride) {
    __m512 lanes = add_lanes(sum);
    alignas(64) uint16_t rounded[16];
    if (PAIRED) {
        lanes = round_bf16(lanes);
        store_bf16(rounded, gated(lanes, _mm512_permute_ps(lanes, 0xb1)));  // 0xb1: each lane meets its neighbour
        for (int r = 0; r < MR; ++r)
            for (int o = 0; o < NR / 2; ++o) y[r * stride + o] = rounded[r * NR + 2 * o];
        return;
    }
    if (bias) {
        alignas(64) float total[16];
        _mm512_store_ps(total, lanes);
        for (int r = 0; r < MR; ++r)
            for (int o = 0; o < NR; ++o) total[r * NR + o] += from_bf16(bias[o]);
        lanes = _mm512_load_ps(total);
    }
    store_bf16(rounded, lanes);
    for (int r = 0; r < MR; ++r)
        for (int o = 0; o < NR; ++o) y[r * stride + o] = rounded[r * NR + o];
}

// MR rows against NR weight rows, at most 16 sums. SEVERAL: other rows of x pass over the same weights and fetch their
// share of those `ahead`.
template <int MR, int NR, bool PAIRED, bool SEVERAL>
inline void dot_tile(const Problem& p, const uint16_t* const* x, const uint16_t* first, const uint16_t* second,
                     const uint16_t* bias, uint16_t* y, int64_t ahead) {
    __m512 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    const uint16_t* w[NR];
    for (int o = 0; o < NR; ++o) w[o] = PAIRED ? (o % 2 ? second : first) + o / 2 * p.in : first + o * p.in;
    add_products<MR, NR, PAIRED || !SEVERAL ? NR : (NR + 1) / 2>(x, w, p.in, ahead, sum);
    store_tile<MR, NR, PAIRED>(sum, bias, y, p.out);
}

// Whether a piece is so large that the next one would be gone from L2 before its turn: then the next tile is fetched.
inline bool near(const Problem& p) { return WEIGHT_ROWS * p.in > 128 * 1024; }

// The weights of the next piece are fetched meanwhile, each of `passes` over this piece fetches its part of them.
template <int MR, bool PAIRED, bool SEVERAL>
inline void dot_rows(const Problem& p, const uint16_t* const* x, int64_t g, int64_t o, int64_t count, uint16_t* y,
                     int64_t pass, int64_t passes) {
    constexpr int NR = PAIRED ? (MR == 1 ? 8 : 16 / MR & ~1) : (MR == 1 ? 8 : 16 / MR);
    constexpr int OUTPUTS = PAIRED ? NR / 2 : NR;
    const uint16_t* first = p.weights[g] + o * p.in;
    const uint16_t* second = first + p.out * p.in;
    const uint16_t* bias = p.biases ? p.biases[g] + o : nullptr;
    int64_t i = 0;
    for (; i < count;) {
        const int64_t ahead = (near(p) ? OUTPUTS : count + (pass * count + i) / passes - i) * p.in;
        const uint16_t *w1 = first + i * p.in, *w2 = second + i * p.in, *b = bias ? bias + i : nullptr;
        if (i + OUTPUTS <= count) {
            dot_tile<MR, NR, PAIRED, SEVERAL>(p, x, w1, w2, b, y + i, ahead);
            i += OUTPUTS;
        } else {
            dot_tile<MR, PAIRED ? 2 : 1, PAIRED, SEVERAL>(p, x, w1, w2, b, y + i, ahead);
            ++i;
        }
    }
}

template <bool PAIRED, bool SEVERAL>
void dots(const Problem& p, int64_t g, int64_t o, int64_t count, int64_t most, int64_t passes) {
    for (int64_t r = p.starts[g], pass = 0; r < p.starts[g + 1]; r += most, ++pass) {
        const int64_t rows = std::min(most, p.starts[g + 1] - r);
        const uint16_t* x[8];
        for (int64_t i = 0; i < rows; ++i) x[i] = p.row(r + i);
        uint16_t* y = p.y + r * p.out + o;
        switch (rows) {
            case 8: dot_rows<8, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 7: dot_rows<7, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 6: dot_rows<6, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 5: dot_rows<5, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 4: dot_rows<4, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 3: dot_rows<3, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 2: dot_rows<2, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
            case 1: dot_rows<1, PAIRED, SEVERAL>(p, x, g, o, count, y, pass, passes); break;
        }
    }
}

template <bool PAIRED>
void dots(const Problem& p, int64_t g, int64_t o, int64_t count) {
    // As many rows as stay in L1 (48 KiB) while weights stream by: 8 rows of 3072 would fill it.
    const int64_t most = p.in > 2048 ? 4 : 8, passes = (p.rows(g) + most - 1) / most;
    if (passes == 1 || near(p))
        dots<PAIRED, false>(p, g, o, count, most, passes);
    else
        dots<PAIRED, true>(p, g, o, count, most, passes);
}

// --- many rows

// A tile of rows of a group: `height` rows from row `first` of the problem, the last `height - rows` of them zero.
struct Tile {
    int64_t first, rows, height;
};

inline void add_tiles(std::vector<Tile>& tiles, int64_t first, int64_t rows) {
    const int64_t count = (rows + TILE - 1) / TILE, height = (rows + count - 1) / count;  // of equal height
    for (int64_t r = 0; r < rows; r += height) tiles.push_back({first + r, std::min(height, rows - r), height});
}

// packed [in / 2][height] pairs of inputs, so that a pair of all rows lies together.
inline void pack_tile(const Problem& p, const Tile& tile, uint32_t* packed) {
    for (int64_t r = 0; r < tile.height; ++r) {
        const uint32_t* row = r < tile.rows ? reinterpret_cast<const uint32_t*>(p.row(tile.first + r)) : nullptr;
        for (int64_t k = 0; k < p.in / 2; ++k) packed[k * tile.height + r] = row ? row[k] : 0;
    }
}

// 16 weight rows -> [in / 2][16] pairs; rows past `count` are zero. `stride` in pairs from one k to the next.
inline void pack_weights(const uint16_t* w, int64_t in, int64_t count, uint32_t* packed, int64_t stride) {
    for (int64_t k = 0; k < in; k += 32) {
        __m512i a[16], b[16];
        for (int64_t o = 0; o < 16; ++o) {
            a[o] = o < count ? _mm512_loadu_si512(w + o * in + k) : _mm512_setzero_si512();
            if (o < count) _mm_prefetch(reinterpret_cast<const char*>(w + o * in + k + 256), _MM_HINT_T0);
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

template <int HEIGHT>
void matmul_tile(const Problem& p, const Tile& tile, const uint32_t* x, const uint32_t* w, const uint16_t* bias,
                 int64_t o, int64_t count) {
    __m512 sum[HEIGHT][2];
    for (int r = 0; r < HEIGHT; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.in / 2; ++k, x += HEIGHT, w += WEIGHT_ROWS) {
        const __m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 16);
#pragma GCC unroll 12
        for (int r = 0; r < HEIGHT; ++r) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, w0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, w1);
        }
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
        uint16_t* y = p.y + (tile.first + r) * p.out + o;
        if (p.paired) {
            store_bf16(y, gated(round_bf16(sum[r][0]), round_bf16(sum[r][1])), count);
            continue;
        }
        for (int half = 0; half < 2 && count > 16 * half; ++half) {
            __m512 total = sum[r][half];
            if (bias) total = _mm512_add_ps(total, load_bf16(bias + 16 * half, count - 16 * half));
            store_bf16(y + 16 * half, total, count - 16 * half);
        }
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
                   const uint16_t* bias, int64_t o, int64_t count) {
    for (int64_t t = 0; t < num_tiles; ++t) {
        switch (tiles[t].height) {
#define POLYMOE_HEIGHT(H) \
    case H: matmul_tile<H>(p, tiles[t], x, packed, bias, o, count); break;
            POLYMOE_HEIGHT(12) POLYMOE_HEIGHT(11) POLYMOE_HEIGHT(10) POLYMOE_HEIGHT(9) POLYMOE_HEIGHT(8) POLYMOE_HEIGHT(7)
            POLYMOE_HEIGHT(6) POLYMOE_HEIGHT(5) POLYMOE_HEIGHT(4) POLYMOE_HEIGHT(3) POLYMOE_HEIGHT(2) POLYMOE_HEIGHT(1)
#undef POLYMOE_HEIGHT
        }
        x += tiles[t].height * (p.in / 2);
    }
}

// --- both

// Memory that is kept from call to call, since fresh pages cost more than filling them.
struct Scratch {
    std::vector<Tile> tiles;
    std::vector<int64_t> first_tile;  // of each group
    std::vector<int64_t> tile_at;     // of each tile: where its pairs start
    std::vector<uint32_t> pairs;
};

// Cut the groups of more than `few` rows into tiles.
inline void make_tiles(const Problem& p, Scratch& scratch, int64_t few = FEW_ROWS) {
    scratch.tiles.clear();
    scratch.first_tile.assign(1, 0);
    scratch.tile_at.clear();
    int64_t pairs = 0;
    for (int64_t g = 0; g < p.num_groups; ++g) {
        if (p.rows(g) > few) add_tiles(scratch.tiles, p.starts[g], p.rows(g));
        for (size_t t = scratch.tile_at.size(); t < scratch.tiles.size(); ++t) {
            scratch.tile_at.push_back(pairs);
            pairs += scratch.tiles[t].height * (p.in / 2);
        }
        scratch.first_tile.push_back(static_cast<int64_t>(scratch.tiles.size()));
    }
    if (static_cast<int64_t>(scratch.pairs.size()) < pairs) scratch.pairs.resize(pairs);
}

// Of each thread: `size` elements that are kept, at a multiple of 64 bytes.
template <class T>
inline T* aligned(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size + 64) buffer.resize(size + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// A piece of a group of many rows, after make_tiles and pack_tiles.
inline void matmul_group(const Problem& p, const Scratch& scratch, int64_t g, const uint32_t* packed,
                         const uint16_t* bias, int64_t o, int64_t count) {
    const int64_t tile = scratch.first_tile[g];
    matmul(p, scratch.tiles.data() + tile, scratch.first_tile[g + 1] - tile, scratch.pairs.data() + scratch.tile_at[tile],
           packed, bias, o, count);
}

inline void pack_tiles(const Problem& p, Scratch& scratch, int num_threads) {
    parallel_for(static_cast<int64_t>(scratch.tiles.size()), 2, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) pack_tile(p, scratch.tiles[t], scratch.pairs.data() + scratch.tile_at[t]);
    });
}

inline void run(const Problem& p, Scratch& scratch, int num_threads) {
    make_tiles(p, scratch);
    const int64_t num_tiles = static_cast<int64_t>(scratch.tiles.size());
    const int64_t step = p.outputs_a_piece(), pieces = (p.out + step - 1) / step;
    pack_tiles(p, scratch, num_threads);
    // A thread fetches weights ahead of itself, so it should have neighbouring pieces, but not too many of the last ones.
    const int64_t chunk = std::clamp<int64_t>(p.num_groups * pieces / (16 * num_threads), 2, 16);
    parallel_for(p.num_groups * pieces, chunk, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<uint32_t> buffer;
        uint32_t* packed = num_tiles ? aligned(buffer, p.in / 2 * WEIGHT_ROWS) : nullptr;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces, o = piece % pieces * step, count = std::min(step, p.out - o);
            if (p.rows(g) > FEW_ROWS) {
                const uint16_t* first = p.weights[g] + o * p.in;
                pack_piece(p, first, first + p.out * p.in, count, packed);
                matmul_group(p, scratch, g, packed, p.biases ? p.biases[g] + o : nullptr, o, count);
            } else if (p.paired) {
                dots<true>(p, g, o, count);
            } else {
                dots<false>(p, g, o, count);
            }
        }
    });
}

}  // namespace polymoe
