// Grouped linear in bfloat16 for few rows a group: y_r = x_r · W_g(r)ᵀ, float32 sums, weights as stored ([out, in]).
//
// In decode the weights are read once for a handful of rows, so the aim is to stream them at the memory's speed. Weights
// are used in their plain row-major layout: a tile of MR rows by NR outputs walks along the input axis, 32 values at a
// time, and sums up at the end. Work is split over (group, block of outputs). Built by hatch_build.py; called through
// ctypes by grouped_linear.py, which has the torch fallback. Needs AVX512-BF16 and a multiple of 32 inputs.

#include "bf16.h"

namespace {

constexpr int64_t OUT_BLOCK = 32;  // outputs of one piece of work: 32 x 1024 bfloat16 are 64 KiB, well inside L2

// MR rows of x against NR outputs, at most 16 sums, which stay in registers.
template <int MR, int NR>
inline void tile(const uint16_t* x, const uint16_t* w, int64_t in, int64_t out, const uint16_t* bias, uint16_t* y) {
    static_assert(MR * NR <= 16, "one sum a lane at the end");
    __m512 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 32) {
        __m512bh weight[NR];
        for (int o = 0; o < NR; ++o) {
            weight[o] = (__m512bh)_mm512_loadu_si512(w + o * in + k);
            _mm_prefetch(reinterpret_cast<const char*>(w + (o + NR) * in + k), _MM_HINT_T0);  // the next tile's
        }
        for (int r = 0; r < MR; ++r) {
            const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * in + k);
            for (int o = 0; o < NR; ++o) sum[r * NR + o] = _mm512_dpbf16_ps(sum[r * NR + o], row, weight[o]);
        }
    }
    alignas(64) float total[16];
    _mm512_store_ps(total, add_lanes(sum));
    if (bias)
        for (int r = 0; r < MR; ++r)
            for (int o = 0; o < NR; ++o) total[r * NR + o] += from_bf16(bias[o]);
    uint16_t rounded[16];
    store_bf16(rounded, _mm512_load_ps(total));
    for (int r = 0; r < MR; ++r)
        for (int o = 0; o < NR; ++o) y[r * out + o] = rounded[r * NR + o];
}

template <int MR>
inline void rows(const uint16_t* x, const uint16_t* w, int64_t in, int64_t out, int64_t count, const uint16_t* bias,
                 uint16_t* y) {
    constexpr int NR = MR == 1 ? 8 : 16 / MR;
    int64_t o = 0;
    for (; o + NR <= count; o += NR) tile<MR, NR>(x, w + o * in, in, out, bias ? bias + o : nullptr, y + o);
    for (; o < count; ++o) tile<MR, 1>(x, w + o * in, in, out, bias ? bias + o : nullptr, y + o);
}

void block(const uint16_t* x, const uint16_t* w, int64_t in, int64_t out, int64_t count, const uint16_t* bias,
           uint16_t* y, int64_t num_rows) {
    for (; num_rows >= 8; num_rows -= 8, x += 8 * in, y += 8 * out) rows<8>(x, w, in, out, count, bias, y);
    switch (num_rows) {
        case 7: rows<7>(x, w, in, out, count, bias, y); break;
        case 6: rows<6>(x, w, in, out, count, bias, y); break;
        case 5: rows<5>(x, w, in, out, count, bias, y); break;
        case 4: rows<4>(x, w, in, out, count, bias, y); break;
        case 3: rows<3>(x, w, in, out, count, bias, y); break;
        case 2: rows<2>(x, w, in, out, count, bias, y); break;
        case 1: rows<1>(x, w, in, out, count, bias, y); break;
    }
}

}  // namespace

// x [rows, in], y [rows, out]; group g has rows starts[g] .. starts[g + 1], weights[g] [out, in] and, unless biases is
// null, biases[g] [out].
extern "C" void polymoe_grouped_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_groups,
                                            const int64_t* starts, const uint16_t* const* weights,
                                            const uint16_t* const* biases, uint16_t* y, int num_threads) {
    const int64_t blocks = (out + OUT_BLOCK - 1) / OUT_BLOCK;
#pragma omp parallel for schedule(dynamic, 2) num_threads(num_threads)
    for (int64_t piece = 0; piece < num_groups * blocks; ++piece) {
        const int64_t g = piece / blocks, o = piece % blocks * OUT_BLOCK;
        const int64_t count = out - o < OUT_BLOCK ? out - o : OUT_BLOCK;
        block(x + starts[g] * in, weights[g] + o * in, in, out, count, biases ? biases[g] + o : nullptr,
              y + starts[g] * out + o, starts[g + 1] - starts[g]);
    }
}
