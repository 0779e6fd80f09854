// Few rows of x times a piece of weights, which stream by as they are stored: see linear.h.
#pragma once

#include "problem.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

constexpr int64_t AHEAD = 8192;  // of the weights that are multiplied those lie that are fetched: 16 KiB (measured on Zen 4)

// Weights that are fetched while others are multiplied: `lines` of 64 bytes from each of `next` on.
struct Fetch {
    const uint16_t* next[2];
    int64_t lines;
};

// How they are: not at all, as many from each of STREAMS addresses as the tile has there, or a share of those, where
// several tiles of rows pass over the same weights.
enum class Fetched { NOTHING, ALL, SHARE };

// sum[r * NR + o] += x[r] . w[o], lane by lane. What is fetched is fetched in the order in which it lies: line by line of a
// page the memory answers at its full speed, row by row, a line of each in turn, at less than half of it (Zen 4).
template <int MR, int NR, Fetched FETCHED = Fetched::NOTHING, int STREAMS = 1>
inline __attribute__((always_inline)) void add_products(const uint16_t* const* x, const uint16_t* const* w, int64_t in,
                                                        __m512* sum, Fetch fetch = {}) {
    static_assert(MR * NR <= 16, "one sum a lane at the end");
    for (int64_t k = 0; k < in; k += 32) {
        __m512bh weight[NR];
        for (int o = 0; o < NR; ++o) weight[o] = (__m512bh)_mm512_loadu_si512(w[o] + k);
        if (FETCHED == Fetched::ALL || (FETCHED == Fetched::SHARE && fetch.lines > 0)) {
            for (int s = 0; s < STREAMS; ++s)
                for (int i = 0; i < NR / STREAMS; ++i, fetch.next[s] += 32)
                    _mm_prefetch(reinterpret_cast<const char*>(fetch.next[s]), _MM_HINT_T1);
            fetch.lines -= NR / STREAMS;
        }
        for (int r = 0; r < MR; ++r) {
            const __m512bh row = (__m512bh)_mm512_loadu_si512(x[r] + k);
            for (int o = 0; o < NR; ++o) sum[r * NR + o] = _mm512_dpbf16_ps(sum[r * NR + o], row, weight[o]);
        }
    }
}

// Sums of MR rows and NR weight rows -> `rows` rows of y, `stride` apart. Paired: weight rows are gate, up, gate, up, …
// and NR / 2 outputs.
template <int MR, int NR, bool PAIRED>
inline __attribute__((always_inline)) void store_tile(const __m512* sum, const uint16_t* bias, uint16_t* y,
                                                      int64_t stride, int64_t rows = MR) {
    __m512 lanes = add_lanes(sum);
    alignas(64) uint16_t rounded[16];
    if (PAIRED) {
        lanes = round_bf16(lanes);
        store_bf16(rounded, gated(lanes, _mm512_permute_ps(lanes, 0xb1)));  // 0xb1: each lane meets its neighbour
        for (int r = 0; r < rows; ++r)
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
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < NR; ++o) y[r * stride + o] = rounded[r * NR + o];
}

// The rows of a group against NR weight rows, MR at a time; of the last ones there may be fewer.
template <int MR, int NR, bool PAIRED, Fetched FETCHED>
inline void dot_tile(const Problem& p, int64_t g, int64_t tiles, const uint16_t* first, const uint16_t* second,
                     const uint16_t* bias, int64_t o) {
    constexpr int STREAMS = PAIRED ? 2 : 1;
    const int64_t start = p.starts[g], count = p.rows(g), lines = NR / STREAMS * p.in / 32;
    const uint16_t* w[NR];
    for (int i = 0; i < NR; ++i) w[i] = PAIRED ? (i % 2 ? second : first) + i / 2 * p.in : first + i * p.in;
    for (int64_t t = 0, from = 0; t < tiles; ++t) {
        const int64_t rows = std::min<int64_t>(MR, count - t * MR), to = (t + 1) * lines / tiles;
        const uint16_t* x[MR];
        for (int64_t r = 0; r < MR; ++r) x[r] = p.row(start + t * MR + std::min(r, rows - 1));
        __m512 sum[16];
        for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
        const int64_t ahead = AHEAD / STREAMS + from * 32;
        add_products<MR, NR, FETCHED, STREAMS>(x, w, p.in, sum, {{first + ahead, second + ahead}, to - from});
        from = to;
        store_tile<MR, NR, PAIRED>(sum, bias, p.y + (start + t * MR) * p.out + o, p.out, rows);
    }
}

template <int MR, bool PAIRED, Fetched FETCHED>
void dots(const Problem& p, int64_t g, int64_t o, int64_t count, int64_t tiles) {
    constexpr int NR = PAIRED ? (MR == 1 ? 8 : 16 / MR & ~1) : (MR == 1 ? 8 : 16 / MR);
    constexpr int OUTPUTS = PAIRED ? NR / 2 : NR;
    const uint16_t* first = p.weights[g] + o * p.in;
    const uint16_t* second = first + p.out * p.in;
    const uint16_t* bias = p.biases ? p.biases[g] + o : nullptr;
    for (int64_t i = 0; i < count;) {
        const uint16_t *w1 = first + i * p.in, *w2 = second + i * p.in, *b = bias ? bias + i : nullptr;
        if (i + OUTPUTS <= count) {
            dot_tile<MR, NR, PAIRED, FETCHED>(p, g, tiles, w1, w2, b, o + i);
            i += OUTPUTS;
        } else {
            dot_tile<MR, PAIRED ? 2 : 1, PAIRED, FETCHED>(p, g, tiles, w1, w2, b, o + i);
            ++i;
        }
    }
}

template <bool PAIRED>
void dots(const Problem& p, int64_t g, int64_t o, int64_t count) {
    // As many rows as stay in half of L1 (32 KiB) while weights stream by, in tiles of nearly equal height.
    const int64_t most = p.in > 1024 ? 4 : 8, rows = p.rows(g), tiles = (rows + most - 1) / most;
    switch (rows ? (rows + tiles - 1) / tiles : 0) {
#define POLYMOE_HEIGHT(H)                                                            \
    case H:                                                                          \
        if (tiles == 1) dots<H, PAIRED, Fetched::ALL>(p, g, o, count, tiles);        \
        else dots<H, PAIRED, Fetched::SHARE>(p, g, o, count, tiles);                 \
        break;
        POLYMOE_HEIGHT(8) POLYMOE_HEIGHT(7) POLYMOE_HEIGHT(6) POLYMOE_HEIGHT(5)
        POLYMOE_HEIGHT(4) POLYMOE_HEIGHT(3) POLYMOE_HEIGHT(2) POLYMOE_HEIGHT(1)
#undef POLYMOE_HEIGHT
    }
}

}  // inline namespace
}  // namespace polymoe
