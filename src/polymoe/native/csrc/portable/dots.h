// Rows of x times rows of weights, both along the inputs: lanes are added up at the end.
#pragma once

#include "vectors.h"

namespace polymoe {

constexpr int64_t PIECE = 32;  // weight rows of a piece of work, and floats from a row's sums to the next row's

// sums[r * PIECE + o] += x[r] · w[o] for MR rows and NR weight rows. `in` is a multiple of W.
template <int MR, int NR, class Weight>
inline void dot_tile(const float* x, int64_t x_stride, const Weight* w, int64_t w_stride, int64_t in, float* sums) {
    Floats total[MR][NR];
    for (auto& row : total)
        for (auto& sum : row) sum = Floats{};
    for (int64_t k = 0; k < in; k += W) {
        Floats weight[NR];
        for (int o = 0; o < NR; ++o) weight[o] = load(w + o * w_stride + k);
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) {
            const Floats row = load(x + r * x_stride + k);
#pragma GCC unroll 8
            for (int o = 0; o < NR; ++o) total[r][o] += row * weight[o];
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int o = 0; o < NR; ++o) sums[r * PIECE + o] += sum_of(total[r][o]);
}

template <int MR, int NR, class Weight>
inline void dot_rows(const float* x, int64_t x_stride, const Weight* w, int64_t w_stride, int64_t outputs, int64_t in,
                     float* sums) {
    int64_t o = 0;
    for (; o + NR <= outputs; o += NR) dot_tile<MR, NR>(x, x_stride, w + o * w_stride, w_stride, in, sums + o);
    for (; o < outputs; ++o) dot_tile<MR, 1>(x, x_stride, w + o * w_stride, w_stride, in, sums + o);
}

// `rows` rows of x by `outputs` rows of weights, float32 or bfloat16.
template <class Weight>
inline void dots(const float* x, int64_t x_stride, int64_t rows, const Weight* w, int64_t w_stride, int64_t outputs, int64_t in,
                 float* sums) {
    while (rows) {
        const int64_t taken = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (taken == 4) dot_rows<4, W == 8 ? 2 : 4>(x, x_stride, w, w_stride, outputs, in, sums);
        else if (taken == 2) dot_rows<2, 4>(x, x_stride, w, w_stride, outputs, in, sums);
        else dot_rows<1, 8>(x, x_stride, w, w_stride, outputs, in, sums);
        rows -= taken, x += taken * x_stride, sums += taken * PIECE;
    }
}

}  // namespace polymoe
