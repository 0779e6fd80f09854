// A base's tile and a delta's tile over it as one matrix in pairs of bfloat16, for products with many rows.
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
    const __m512i table = _mm512_loadu_si512(delta.table);
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

// A tile's codes -> bytes [in / 4][64].
inline void unpack_tile(int64_t bits, const TileOf& tile, int64_t in, uint8_t* to) {
    const __m512i table = _mm512_loadu_si512(tile.table);
    switch (bits) {
#define POLYMOE_BITS(B) \
    case B: unpack_group<B>(tile.codes, in / UNIT, table, tile.ahead, to); return;
        POLYMOE_BITS(1) POLYMOE_BITS(2) POLYMOE_BITS(3) POLYMOE_BITS(4) POLYMOE_BITS(5) POLYMOE_BITS(6) POLYMOE_BITS(8)
#undef POLYMOE_BITS
    }
}

}  // namespace polymoe
