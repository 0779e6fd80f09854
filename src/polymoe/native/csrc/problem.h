// What a product in bfloat16 is asked for, and how its sums become outputs.
#pragma once

#include <algorithm>
#include <vector>

#include "bf16.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

constexpr int64_t WEIGHT_ROWS = 32;  // of one piece: 32 x 1024 bfloat16 are 64 KiB, well inside L2

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

// Of each thread: `size` elements that are kept, at a multiple of 64 bytes.
template <class T>
inline T* aligned(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size + 64) buffer.resize(size + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

}  // inline namespace
}  // namespace polymoe
