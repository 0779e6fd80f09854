// Weights into scaled codes: for each group of a row the scale, the nearest level of each value, and the packed codes.
//
//     s_0 = sqrt(Σ w² / n),   s = Σ w l(w / s_0) / Σ l(w / s_0)²  rounded to bfloat16,   code = nearest level of w / s
//
// Scales of 8 bits are the largest value over 127, those of 1 bit the mean over the level. Layout and levels are those of
// polymoe/quant/formats.py. Needs AVX512.

#include <float.h>
#include <math.h>

#include <algorithm>
#include <vector>

#include "bf16.h"
#include "pack_codes.h"
#include "threads.h"

namespace {

struct Levels {
    const float* values;    // [2^bits]
    const int32_t* search;  // code of the level nearest to each 1 / resolution step of [-limit, limit]
    float limit, resolution;
    int64_t bits;
};

inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// w / scale, 0 where that is not finite.
inline __m512 ratio(__m512 w, __m512 scale) {
    const __m512 r = _mm512_div_ps(w, scale);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(r), _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ), r);
}

inline __m512i nearest(const Levels& l, __m512 r) {
    if (l.bits == 8) {
        const __m512 whole = _mm512_roundscale_ps(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 held = _mm512_min_ps(_mm512_max_ps(whole, _mm512_set1_ps(-127)), _mm512_set1_ps(127));
        return _mm512_add_epi32(_mm512_cvtps_epi32(held), _mm512_set1_epi32(128));
    }
    if (l.bits == 1) return _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(r, _mm512_setzero_ps(), _CMP_GT_OQ), 1);
    const __m512 held = _mm512_min_ps(_mm512_max_ps(r, _mm512_set1_ps(-l.limit)), _mm512_set1_ps(l.limit));
    const __m512 step = _mm512_mul_ps(_mm512_add_ps(held, _mm512_set1_ps(l.limit)), _mm512_set1_ps(l.resolution));
    return _mm512_i32gather_epi32(_mm512_cvttps_epi32(step), l.search, 4);
}

// The scale of `count` values; a group has room for `size`, what is missing counts as zeros.
float fit(const Levels& l, const float* w, int64_t count, int64_t size) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), w + i);
        if (l.bits == 8) total = _mm512_max_ps(total, _mm512_abs_ps(v));
        else if (l.bits == 1) total = _mm512_add_ps(total, _mm512_abs_ps(v));
        else total = _mm512_fmadd_ps(v, v, total);
    }
    if (l.bits == 8) return _mm512_reduce_max_ps(total) / 127;
    const float mean = _mm512_reduce_add_ps(total) / static_cast<float>(count);
    if (l.bits == 1) return mean / l.values[1];
    const __m512 first = _mm512_set1_ps(sqrtf(mean));
    __m512 above = _mm512_setzero_ps(), below = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {  // zeros have a level too
        const __m512 v = _mm512_maskz_loadu_ps(lanes(std::max<int64_t>(0, count - i)), w + i);
        const __m512 level = _mm512_i32gather_ps(nearest(l, ratio(v, first)), l.values, 4);
        above = _mm512_fmadd_ps(v, level, above);
        below = _mm512_fmadd_ps(level, level, below);
    }
    const float divisor = _mm512_reduce_add_ps(below);
    return divisor > 0 ? _mm512_reduce_add_ps(above) / divisor : 0;
}

}  // namespace

// weight [outputs, inputs] float32 -> packed [outputs, row_bytes] and scales [outputs, groups] bfloat16.
extern "C" void polymoe_encode_f32(const float* weight, int64_t outputs, int64_t inputs, int64_t size, int64_t bits,
                                   const float* values, const int32_t* search, float limit, float resolution,
                                   uint8_t* packed, int64_t row_bytes, uint16_t* scales, int num_threads) {
    const Levels l = {values, search, limit, resolution, bits};
    const int64_t groups = (inputs + size - 1) / size;
    polymoe::parallel_for(outputs, 16, num_threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(inputs + 64);  // the last block may be short
        for (int64_t o = begin; o < end; ++o) {
            for (int64_t g = 0; g < groups; ++g) {
                const float* w = weight + o * inputs + g * size;
                const int64_t count = std::min(size, inputs - g * size);
                alignas(32) uint16_t rounded[16];
                store_bf16(rounded, _mm512_set1_ps(fit(l, w, count, size)));
                scales[o * groups + g] = rounded[0];
                const __m512 scale = _mm512_set1_ps(from_bf16(rounded[0]));
                for (int64_t i = 0; i < count; i += 16) {
                    const __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), w + i);
                    const __m128i code = _mm512_cvtepi32_epi8(nearest(l, ratio(v, scale)));
                    _mm_mask_storeu_epi8(codes.data() + g * size + i, lanes(count - i), code);
                }
            }
            polymoe::pack(codes.data(), inputs, bits, packed + o * row_bytes);
        }
    });
}
