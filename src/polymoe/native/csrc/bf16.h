// Small pieces that the CPU kernels share.
#pragma once

#include <immintrin.h>
#include <stdint.h>

// Functions of headers are compiled into each source that includes them, and of those with one name the linker keeps one.
// Sources that are compiled for more instructions than the others (hatch_build.py) have names of their own for them.
#ifdef __AVX512VBMI__
#define POLYMOE_INSTRUCTIONS with_vbmi
#else
#define POLYMOE_INSTRUCTIONS without_vbmi
#endif

inline namespace POLYMOE_INSTRUCTIONS {

inline float from_bf16(uint16_t value) {
    union { uint32_t u; float f; } bits = {static_cast<uint32_t>(value) << 16};
    return bits.f;
}

// 16 bfloat16 values as float32.
inline __m512 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The first `count` of them (all from 16 on), zero past the end.
inline __m512 load_bf16(const uint16_t* p, int64_t count) {
    const __mmask16 valid = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p)), 16));
}

// 16 float32 values rounded to nearest even, as torch does.
inline void store_bf16(uint16_t* p, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(values));
}

// The first `count` of them (all from 16 on).
inline void store_bf16(uint16_t* p, __m512 values, int64_t count) {
    const __mmask16 valid = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
    _mm256_mask_storeu_epi16(p, valid, (__m256i)_mm512_cvtneps_pbh(values));
}

// Rounded to bfloat16 and back.
inline __m512 round_bf16(__m512 values) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The 16 lanes of sum[i] added up, for i = 0 .. 15, as one vector: a transpose that adds on its way.
inline __m512 add_lanes(const __m512* sum) {
    __m512 quads[4];
    for (int q = 0; q < 4; ++q) {
        const __m512* s = sum + 4 * q;
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
        const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        quads[q] = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    }
    const __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
    const __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                                   _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd));
}

// e^x to about 1e-7 relative, for x <= 0 (a softmax after its maximum is taken away).
inline __m512 exp_negative(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

}  // inline namespace
