// Few rows of x times a piece of weights, which stream by as they are stored: see linear.h.
#pragma once

#include "problem.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

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

}  // inline namespace
}  // namespace polymoe
