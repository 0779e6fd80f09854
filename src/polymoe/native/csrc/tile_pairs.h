// A base's tile and a delta's tile over it as one matrix, for products with many rows: in pairs of bfloat16, or rounded to
// bytes once more.
//
// With few rows it pays to multiply by the codes (tiles.h): base and delta are two products, and each is half as long as
// one in bfloat16. With many rows the second product costs more than adding the weights up once.
#pragma once

#include "tiles.h"

namespace polymoe {

// Byte i of each 32 bits, level + 128, -> the level in float32.
template <int I>
inline __attribute__((always_inline)) __m512 level(__m512i bytes) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-128), bytes, _mm512_set1_epi32(1 << 8 * I)));
}

// Pairs [*][stride] of 16 outputs by 4 inputs: two rows of them.
inline __attribute__((always_inline)) void store_pairs(__m512 w0, __m512 w1, __m512 w2, __m512 w3, uint32_t* to,
                                                       int64_t stride) {
    alignas(64) static constexpr uint16_t WOVEN[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i woven = _mm512_load_si512(WOVEN);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(woven, (__m512i)_mm512_cvtne2ps_pbh(w1, w0)));
    _mm512_store_si512(to + stride, _mm512_permutexvar_epi16(woven, (__m512i)_mm512_cvtne2ps_pbh(w3, w2)));
}

// The base's bytes [in / 4][64] and a delta's codes -> pairs [in / 2][stride] of their sum. Their groups are of one size.
template <int BITS>
void sum_pairs(const uint8_t* bytes, const TileOf& base, const TileOf& delta, int64_t in, uint32_t* pairs, int64_t stride) {
    const Table<BITS> table(delta.table);
    const uint8_t* codes = delta.codes;
    for (int64_t start = 0, g = 0; start < in; start += base.group, ++g) {
        const __m512 scale = base.scale(g), scale_delta = delta.scale(g);
        for (int64_t k = start; k < std::min(start + base.group, in); k += UNIT, codes += 64 * BITS) {
            const Unit<BITS> unit(codes);
            for (int i = 0; i < BITS; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + delta.ahead), _MM_HINT_T1);
            const auto add = [&](__m512i d) __attribute__((always_inline)) {
                const __m512i b = _mm512_load_si512(bytes);
                store_pairs(_mm512_fmadd_ps(scale_delta, level<0>(d), _mm512_mul_ps(scale, level<0>(b))),
                            _mm512_fmadd_ps(scale_delta, level<1>(d), _mm512_mul_ps(scale, level<1>(b))),
                            _mm512_fmadd_ps(scale_delta, level<2>(d), _mm512_mul_ps(scale, level<2>(b))),
                            _mm512_fmadd_ps(scale_delta, level<3>(d), _mm512_mul_ps(scale, level<3>(b))), pairs, stride);
                bytes += 64, pairs += 2 * stride;
            };
            add(unit.template bytes<0>(table)), add(unit.template bytes<1>(table)), add(unit.template bytes<2>(table));
            add(unit.template bytes<3>(table)), add(unit.template bytes<4>(table)), add(unit.template bytes<5>(table));
            add(unit.template bytes<6>(table)), add(unit.template bytes<7>(table));
        }
    }
}

// bits: of the delta.
inline void sum_pairs(int64_t bits, const uint8_t* bytes, const TileOf& base, const TileOf& delta, int64_t in,
                      uint32_t* pairs, int64_t stride) {
    switch (bits) {
#define POLYMOE_BITS(B) \
    case B: return sum_pairs<B>(bytes, base, delta, in, pairs, stride);
        POLYMOE_BITS(1) POLYMOE_BITS(2) POLYMOE_BITS(3) POLYMOE_BITS(4) POLYMOE_BITS(5) POLYMOE_BITS(6) POLYMOE_BITS(8)
#undef POLYMOE_BITS
    }
}

// The base's bytes [in / 4][64] and a delta's codes -> bytes of their sum, level + 128, and what 1 of a level is worth,
// [groups][16]: the largest sum that base and delta can have is 127 of them.
template <int BITS>
void sum_bytes(const uint8_t* bytes, const TileOf& base, const TileOf& delta, int64_t in, uint8_t* to, float* scales) {
    const Table<BITS> table(delta.table);
    const __m512i middle = _mm512_set1_epi8(-128), half = _mm512_set1_epi16(static_cast<int16_t>(0x8080));
    const __m512i none = _mm512_setzero_si512();
    const uint8_t* codes = delta.codes;
    for (int64_t start = 0, g = 0; start < in; start += base.group, ++g, scales += LANES) {
        const __m512 scale = base.scale(g), scale_delta = delta.scale(g);
        const __m512 both = _mm512_add_ps(scale, _mm512_abs_ps(scale_delta));
        _mm512_storeu_ps(scales, both);
        // Shares of `both` in 32767ths, twice in the 32 bits of each output.
        const __m512 ratio = _mm512_div_ps(_mm512_set1_ps(32767), _mm512_max_ps(both, _mm512_set1_ps(1e-30f)));
        const auto twice = [&](__m512 value) __attribute__((always_inline)) {
            const __m512i share = _mm512_cvttps_epi32(_mm512_mul_ps(value, ratio));
            return _mm512_mask_mov_epi16(_mm512_slli_epi32(share, 16), 0x55555555, share);
        };
        const __m512i share = twice(scale), share_delta = twice(scale_delta);
        const __m512i low = _mm512_unpacklo_epi32(share, share), high = _mm512_unpackhi_epi32(share, share);
        const __m512i low_delta = _mm512_unpacklo_epi32(share_delta, share_delta);
        const __m512i high_delta = _mm512_unpackhi_epi32(share_delta, share_delta);
        for (int64_t k = start; k < std::min(start + base.group, in); k += UNIT, codes += 64 * BITS) {
            const Unit<BITS> unit(codes);
            for (int i = 0; i < BITS; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + delta.ahead), _MM_HINT_T1);
            const auto add = [&](__m512i d) __attribute__((always_inline)) {
                const __m512i b = _mm512_xor_si512(_mm512_load_si512(bytes), middle);
                d = _mm512_xor_si512(d, middle);
                // 256 times a level, times its share of 32768ths, rounded; then the sum's upper byte.
                const auto sum = [&](__m512i b256, __m512i d256, __m512i of_base, __m512i of_delta) __attribute__((always_inline)) {
                    const __m512i both = _mm512_add_epi16(_mm512_mulhrs_epi16(b256, of_base), _mm512_mulhrs_epi16(d256, of_delta));
                    return _mm512_srli_epi16(_mm512_add_epi16(both, half), 8);
                };
                const __m512i lower = sum(_mm512_unpacklo_epi8(none, b), _mm512_unpacklo_epi8(none, d), low, low_delta);
                const __m512i upper = sum(_mm512_unpackhi_epi8(none, b), _mm512_unpackhi_epi8(none, d), high, high_delta);
                _mm512_store_si512(to, _mm512_packus_epi16(lower, upper));
                bytes += 64, to += 64;
            };
            add(unit.template bytes<0>(table)), add(unit.template bytes<1>(table)), add(unit.template bytes<2>(table));
            add(unit.template bytes<3>(table)), add(unit.template bytes<4>(table)), add(unit.template bytes<5>(table));
            add(unit.template bytes<6>(table)), add(unit.template bytes<7>(table));
        }
    }
}

// bits: of the delta.
inline void sum_bytes(int64_t bits, const uint8_t* bytes, const TileOf& base, const TileOf& delta, int64_t in, uint8_t* to,
                      float* scales) {
    switch (bits) {
        case 1: return sum_bytes<1>(bytes, base, delta, in, to, scales);
        case 2: return sum_bytes<2>(bytes, base, delta, in, to, scales);
        case 3: return sum_bytes<3>(bytes, base, delta, in, to, scales);
    }
}

// A tile's codes -> bytes [in / 4][64].
inline void unpack_tile(int64_t bits, const TileOf& tile, int64_t in, uint8_t* to) {
    switch (bits) {
#define POLYMOE_BITS(B) \
    case B: unpack_group<B>(tile.codes, in / UNIT, Table<B>(tile.table), tile.ahead, to); return;
        POLYMOE_BITS(1) POLYMOE_BITS(2) POLYMOE_BITS(3) POLYMOE_BITS(4) POLYMOE_BITS(5) POLYMOE_BITS(6) POLYMOE_BITS(8)
#undef POLYMOE_BITS
    }
}

}  // namespace polymoe
