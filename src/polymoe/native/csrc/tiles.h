// Packed matrices in tiles of 16 outputs, multiplied in 8-bit integers.
//
// A row of activations is rounded to 8-bit integers with a scale for each group of inputs that shares a weight's scale, a
// second 8 bits hold what the first leave where asked (16 bits in all). Weights are unsigned bytes, level + 128, so that
//
//     y = step · s_w · s_x · (Σ byte · x  −  128 Σ x)        for each group, and summed over groups in float32
//
// tile_layout.h says how a matrix lies.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "amx.h"
#include "bf16.h"
#include "tile_layout.h"

namespace polymoe {

template <int BITS>
struct Width {
    static constexpr int WIDE = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, NARROW = BITS - WIDE;
};

// 0, 1, 2, … 63.
struct Bytes {
    uint8_t count[64];
    constexpr Bytes() : count() {
        for (int i = 0; i < 64; ++i) count[i] = static_cast<uint8_t>(i);
    }
};
inline constexpr Bytes BYTES;

// What each code stands for, level + 128. Two bits are looked up where they lie in a byte's lower six.
template <int BITS>
struct Table {
    static constexpr int PLACES = BITS == 2 ? 3 : 1;
    __m512i at[PLACES];

    inline __attribute__((always_inline)) explicit Table(const uint8_t* levels) {
        at[0] = _mm512_loadu_si512(levels);
        const __m512i byte = _mm512_loadu_si512(BYTES.count);
        for (int place = 1; place < PLACES; ++place) {
            const __m512i code = _mm512_srli_epi16(byte, BITS * place);
            at[place] = _mm512_permutexvar_epi8(_mm512_and_si512(code, _mm512_set1_epi8((1 << BITS) - 1)), at[0]);
        }
    }
};

// A unit's codes. `at<Q>` gives vector Q; bits above the format's are rubbish, which the table of 64 does not mind.
template <int BITS>
struct Unit {
    static constexpr int WIDE = Width<BITS>::WIDE, NARROW = Width<BITS>::NARROW;
    __m512i wide[WIDE], narrow[NARROW + 1];

    inline __attribute__((always_inline)) explicit Unit(const uint8_t* codes) {
        for (int i = 0; i < WIDE; ++i) wide[i] = _mm512_loadu_si512(codes + 64 * i);
        for (int i = 0; i < NARROW; ++i) narrow[i] = _mm512_loadu_si512(codes + 64 * (WIDE + i));
    }

    template <int Q>
    inline __attribute__((always_inline)) __m512i at() const {
        constexpr int IN_BYTE = 8 / WIDE, SHIFT = Q % IN_BYTE * WIDE;
        __m512i code = wide[Q / IN_BYTE];
        if constexpr (SHIFT > 0) code = _mm512_srli_epi16(code, SHIFT);
        if constexpr (NARROW > 0) {
            constexpr int ABOVE_IN_BYTE = 8 / NARROW, ABOVE = Q % ABOVE_IN_BYTE * NARROW - WIDE;
            __m512i above = narrow[Q / ABOVE_IN_BYTE];
            if constexpr (ABOVE > 0) above = _mm512_srli_epi16(above, ABOVE);
            if constexpr (ABOVE < 0) above = _mm512_slli_epi16(above, -ABOVE);
            code = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << WIDE) - 1), code, above, 0xca);
        }
        return code;
    }

    template <int Q>
    inline __attribute__((always_inline)) __m512i bytes(const Table<BITS>& table) const {
        if constexpr (BITS == 8) {
            return wide[Q];
        } else if constexpr (BITS == 2) {
            constexpr int PLACE = Q % 4;
            if constexpr (PLACE < 3) return _mm512_permutexvar_epi8(wide[Q / 4], table.at[PLACE]);
            return _mm512_permutexvar_epi8(_mm512_srli_epi16(wide[Q / 4], 2), table.at[2]);
        } else {
            return _mm512_permutexvar_epi8(at<Q>(), table.at[0]);
        }
    }
};

// Rows of activations in 8-bit integers, R of them.
struct Rounded {
    const int8_t *high, *low;  // [R, in]; low may be null
    const float* scales;       // [R, groups]
    const int32_t* sums;       // [R, groups, 2]: 128 Σ of both
    int64_t in, groups;

    Rounded from(int64_t row) const {
        return {high + row * in, low ? low + row * in : nullptr, scales + row * groups, sums + row * groups * 2, in, groups};
    }
};

inline void round_row(const uint16_t* x, int64_t in, int64_t group, int8_t* high, int8_t* low, float* scales, int32_t* sums) {
    for (int64_t start = 0; start < in; start += group, ++scales, sums += 2) {
        const int64_t stop = std::min(start + group, in);
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = start; k < stop; k += 16) most = _mm512_max_ps(most, _mm512_abs_ps(load_bf16(x + k)));
        const float largest = _mm512_reduce_max_ps(most);
        *scales = largest / 127;
        const __m512 ratio = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
        __m512i sum = _mm512_setzero_si512(), sum_low = sum;
        for (int64_t k = start; k < stop; k += 16) {
            const __m512 value = _mm512_mul_ps(load_bf16(x + k), ratio);
            const __m512i whole = _mm512_cvtps_epi32(value);
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(high + k), _mm512_cvtsepi32_epi8(whole));
            if (!low) continue;
            const __m512 left = _mm512_sub_ps(value, _mm512_cvtepi32_ps(whole));
            const __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(LOW_STEPS)));
            sum_low = _mm512_add_epi32(sum_low, rest);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(low + k), _mm512_cvtsepi32_epi8(rest));
        }
        sums[0] = 128 * _mm512_reduce_add_epi32(sum);
        sums[1] = 128 * _mm512_reduce_add_epi32(sum_low);
    }
}

inline __attribute__((always_inline)) __m512i four_bytes(const int8_t* from) {
    int32_t value;
    memcpy(&value, from, 4);
    return _mm512_set1_epi32(value);
}

// One group's sums of a row -> added to `to`, 16 outputs. scale: of weights, step and sign in it.
inline __attribute__((always_inline)) void add_group(__m512i sum, __m512i sum_low, bool two, const Rounded& x, int64_t row,
                                                     int64_t g, __m512 scale, float* to) {
    const int32_t* sums = x.sums + (row * x.groups + g) * 2;
    __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(sums[0])));
    if (two) {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum_low, _mm512_set1_epi32(sums[1])));
        value = _mm512_fmadd_ps(low, _mm512_set1_ps(1 / LOW_STEPS), value);
    }
    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[row * x.groups + g]));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(value, both, _mm512_loadu_ps(to)));
}

// One matrix's tile: where its codes and scales begin.
struct TileOf {
    const uint8_t* codes;
    const uint16_t* scales;
    const uint8_t* table;
    float step;        // sign in it
    int64_t group;
    int64_t ahead, scales_ahead;  // bytes and scales from here to the same of the tile that is read next

    __m512 scale(int64_t g) const {
        const uint16_t* its = scales + g * LANES;
        _mm_prefetch(reinterpret_cast<const char*>(its + scales_ahead), _MM_HINT_T1);
        return _mm512_mul_ps(load_bf16(its), _mm512_set1_ps(step));
    }
};

// The first R rows of x, codes straight into products. to: [R, stride].
template <int BITS, int R, bool TWO>
void fused_rows(const TileOf& tile, const Rounded& x, float* to, int64_t stride) {
    constexpr int CHAINS = R == 1 && !TWO ? 4 : R <= 2 ? 2 : 1;  // sums that do not wait for each other
    const Table<BITS> table(tile.table);
    const uint8_t* codes = tile.codes;
    for (int64_t start = 0, g = 0; start < x.in; start += tile.group, ++g) {
        const int64_t stop = std::min(start + tile.group, x.in);
        __m512i sum[CHAINS][R], low[CHAINS][R];
        for (int c = 0; c < CHAINS; ++c)
            for (int r = 0; r < R; ++r) sum[c][r] = low[c][r] = _mm512_setzero_si512();
        for (int64_t k = start; k < stop; k += UNIT, codes += 64 * BITS) {
            const Unit<BITS> unit(codes);
            for (int i = 0; i < BITS; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + tile.ahead), _MM_HINT_T1);
#define POLYMOE_VECTOR(Q)                                                                                  \
    {                                                                                                      \
        const __m512i w = unit.template bytes<Q>(table);                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                              \
            const int64_t at = r * x.in + k + 4 * Q;                                                 \
            sum[Q % CHAINS][r] = _mm512_dpbusd_epi32(sum[Q % CHAINS][r], w, four_bytes(x.high + at));      \
            if (TWO) low[Q % CHAINS][r] = _mm512_dpbusd_epi32(low[Q % CHAINS][r], w, four_bytes(x.low + at)); \
        }                                                                                                  \
    }
            POLYMOE_VECTOR(0) POLYMOE_VECTOR(1) POLYMOE_VECTOR(2) POLYMOE_VECTOR(3)
            POLYMOE_VECTOR(4) POLYMOE_VECTOR(5) POLYMOE_VECTOR(6) POLYMOE_VECTOR(7)
#undef POLYMOE_VECTOR
        }
        const __m512 scale = tile.scale(g);
        for (int r = 0; r < R; ++r) {
            for (int c = 1; c < CHAINS; ++c) {
                sum[0][r] = _mm512_add_epi32(sum[0][r], sum[c][r]);
                low[0][r] = _mm512_add_epi32(low[0][r], low[c][r]);
            }
            add_group(sum[0][r], low[0][r], TWO, x, r, g, scale, to + r * stride);
        }
    }
}

// The first R rows of x times a tile of 1 bit. Bits stay where they are in their bytes: a vector at shift s is 2^s times
// too large, and has sums of its own until a group ends.
template <int R>
void bit_rows(const TileOf& tile, const Rounded& x, float* to, int64_t stride) {
    constexpr int SHIFTS = 4;
    const int low = tile.table[0], apart = tile.table[1] - low;
    const uint8_t* codes = tile.codes;
    for (int64_t start = 0, g = 0; start < x.in; start += tile.group, ++g) {
        const int64_t stop = std::min(start + tile.group, x.in);
        __m512i sum[SHIFTS][R];
        for (int s = 0; s < SHIFTS; ++s)
            for (int r = 0; r < R; ++r) sum[s][r] = _mm512_setzero_si512();
        for (int64_t k = start; k < stop; k += UNIT, codes += 64) {
            const __m512i code = _mm512_loadu_si512(codes), above = _mm512_srli_epi16(code, SHIFTS);
            _mm_prefetch(reinterpret_cast<const char*>(codes + tile.ahead), _MM_HINT_T1);
#pragma GCC unroll 8
            for (int q = 0; q < VECTORS; ++q) {
                const int s = q % SHIFTS;
                const __m512i w = _mm512_and_si512(q < SHIFTS ? code : above, _mm512_set1_epi8(static_cast<char>(1 << s)));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                    sum[s][r] = _mm512_dpbusd_epi32(sum[s][r], w, four_bytes(x.high + r * x.in + k + 4 * q));
            }
        }
        const __m512 scale = tile.scale(g);
        for (int r = 0; r < R; ++r) {
            __m512i bits = sum[0][r];
            for (int s = 1; s < SHIFTS; ++s) bits = _mm512_add_epi32(bits, _mm512_srai_epi32(sum[s][r], s));
            const __m512i all = _mm512_set1_epi32(x.sums[(r * x.groups + g) * 2] / 128 * low);
            const __m512i levels = _mm512_add_epi32(_mm512_mullo_epi32(bits, _mm512_set1_epi32(apart)), all);
            add_group(levels, levels, false, x, r, g, scale, to + r * stride);
        }
    }
}

template <int BITS>
const uint8_t* unpack_group(const uint8_t* codes, int64_t units, const Table<BITS>& table, int64_t ahead, uint8_t* to) {
    for (int64_t u = 0; u < units; ++u, codes += 64 * BITS, to += 64 * VECTORS) {
        const Unit<BITS> unit(codes);
        for (int i = 0; i < BITS; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + ahead), _MM_HINT_T1);
#define POLYMOE_VECTOR(Q) _mm512_store_si512(to + 64 * Q, unit.template bytes<Q>(table));
        POLYMOE_VECTOR(0) POLYMOE_VECTOR(1) POLYMOE_VECTOR(2) POLYMOE_VECTOR(3)
        POLYMOE_VECTOR(4) POLYMOE_VECTOR(5) POLYMOE_VECTOR(6) POLYMOE_VECTOR(7)
#undef POLYMOE_VECTOR
    }
    return codes;
}

// R rows times a group's unpacked bytes [vectors][64].
template <int R, bool TWO>
void block_rows(const uint8_t* bytes, int64_t vectors, const Rounded& x, int64_t start, int64_t g,
                __m512 scale, float* to, int64_t stride) {
    __m512i sum[R], low[R];
    const int8_t *high_of[R], *low_of[R];
    for (int r = 0; r < R; ++r) {
        sum[r] = low[r] = _mm512_setzero_si512();
        high_of[r] = x.high + r * x.in + start;
        if (TWO) low_of[r] = x.low + r * x.in + start;
    }
    for (int64_t v = 0; v < vectors; ++v) {
        const __m512i w = _mm512_load_si512(bytes + 64 * v);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            sum[r] = _mm512_dpbusd_epi32(sum[r], w, four_bytes(high_of[r] + 4 * v));
            if (TWO) low[r] = _mm512_dpbusd_epi32(low[r], w, four_bytes(low_of[r] + 4 * v));
        }
    }
    for (int r = 0; r < R; ++r) add_group(sum[r], low[r], TWO, x, r, g, scale, to + r * stride);
}

// At most 16 rows, the same on AMX. Past `vectors` and up to a multiple of 16 of them bytes are zero.
template <bool TWO>
void amx_rows(const uint8_t* bytes, int64_t vectors, const Rounded& x, int64_t start, int64_t g, int64_t rows, __m512 scale,
              float* to, int64_t stride) {
    alignas(64) int32_t sums[2][amx::ROWS][LANES];
    amx::zero<0>();
    if (TWO) amx::zero<1>();
    for (int64_t v = 0; v < vectors; v += 16) {
        amx::load<2>(bytes + 64 * v, 64);
        amx::load<3>(x.high + start + 4 * v, x.in);
        amx::add_int8<0, 3, 2>();
        if (TWO) amx::load<4>(x.low + start + 4 * v, x.in), amx::add_int8<1, 4, 2>();
    }
    amx::store<0>(sums[0], 64);
    if (TWO) amx::store<1>(sums[1], 64);
    for (int64_t r = 0; r < rows; ++r)
        add_group(_mm512_load_si512(sums[0][r]), TWO ? _mm512_load_si512(sums[1][r]) : _mm512_setzero_si512(), TWO, x, r, g,
                  scale, to + r * stride);
}

// `count` rows times a group's unpacked bytes; past `size` inputs, up to a multiple of 64 of them, there is room.
template <bool TWO>
void group_rows(uint8_t* bytes, int64_t size, const Rounded& x, int64_t start, int64_t g, int64_t count, __m512 scale,
                float* to, int64_t stride) {
    constexpr int64_t MOST = TWO ? 8 : 12;
    if (amx::chosen() & amx::INT8) {
        if (size % 64) memset(bytes + size * LANES, 0, UNIT * LANES);
        for (int64_t r = 0; r < count; r += amx::ROWS)
            amx_rows<TWO>(bytes, size / 4, x.from(r), start, g, std::min(amx::ROWS, count - r), scale, to + r * stride, stride);
        return;
    }
    const int64_t blocks = (count + MOST - 1) / MOST, most = (count + blocks - 1) / blocks;
    for (int64_t r = 0; r < count; r += most) {
        float* at = to + r * stride;
        switch (std::min(most, count - r)) {
#define POLYMOE_ROWS(R) \
    case R: block_rows<R, TWO>(bytes, size / 4, x.from(r), start, g, scale, at, stride); break;
            POLYMOE_ROWS(1) POLYMOE_ROWS(2) POLYMOE_ROWS(3) POLYMOE_ROWS(4) POLYMOE_ROWS(5) POLYMOE_ROWS(6)
            POLYMOE_ROWS(7) POLYMOE_ROWS(8)
            default:
                if constexpr (!TWO) switch (std::min(most, count - r)) {
                    POLYMOE_ROWS(9) POLYMOE_ROWS(10) POLYMOE_ROWS(11) POLYMOE_ROWS(12)
                }
#undef POLYMOE_ROWS
        }
    }
}

template <int BITS, bool TWO>
void many_rows(const TileOf& tile, const Rounded& x, int64_t count, float* to, int64_t stride) {
    alignas(64) static thread_local uint8_t bytes[MOST_GROUP * LANES];
    const Table<BITS> table(tile.table);
    const uint8_t* codes = tile.codes;
    for (int64_t start = 0, g = 0; start < x.in; start += tile.group, ++g) {
        const int64_t size = std::min(tile.group, x.in - start);
        codes = unpack_group<BITS>(codes, size / UNIT, table, tile.ahead, bytes);
        group_rows<TWO>(bytes, size, x, start, g, count, tile.scale(g), to, stride);
    }
}

// to[r] += tile · x[r] for the first `count` rows of x, 16 outputs each, `stride` apart.
template <int BITS>
void tile_rows(const TileOf& tile, const Rounded& x, int64_t count, float* to, int64_t stride) {
    const bool two = x.low != nullptr;
    if constexpr (BITS == 1)
        if (!two && count <= 6) switch (count) {
#define POLYMOE_ROWS(R) \
    case R: return bit_rows<R>(tile, x, to, stride);
            POLYMOE_ROWS(1) POLYMOE_ROWS(2) POLYMOE_ROWS(3) POLYMOE_ROWS(4) POLYMOE_ROWS(5) POLYMOE_ROWS(6)
#undef POLYMOE_ROWS
        }
    // Up to 8 rows need no buffer: storing a vector takes as long as multiplying it by two rows.
    if (count <= (amx::chosen() & amx::INT8 ? 4 : 8)) switch (count) {
#define POLYMOE_ROWS(R) \
    case R: return two ? fused_rows<BITS, R, true>(tile, x, to, stride) : fused_rows<BITS, R, false>(tile, x, to, stride);
            POLYMOE_ROWS(1) POLYMOE_ROWS(2) POLYMOE_ROWS(3) POLYMOE_ROWS(4) POLYMOE_ROWS(5) POLYMOE_ROWS(6)
            POLYMOE_ROWS(7) POLYMOE_ROWS(8)
#undef POLYMOE_ROWS
        }
    two ? many_rows<BITS, true>(tile, x, count, to, stride) : many_rows<BITS, false>(tile, x, count, to, stride);
}

inline void tile_rows(int64_t bits, const TileOf& tile, const Rounded& x, int64_t count, float* to,
                      int64_t stride) {
    switch (bits) {
        case 1: return tile_rows<1>(tile, x, count, to, stride);
        case 2: return tile_rows<2>(tile, x, count, to, stride);
        case 3: return tile_rows<3>(tile, x, count, to, stride);
        case 4: return tile_rows<4>(tile, x, count, to, stride);
        case 5: return tile_rows<5>(tile, x, count, to, stride);
        case 6: return tile_rows<6>(tile, x, count, to, stride);
        case 8: return tile_rows<8>(tile, x, count, to, stride);
    }
}

}  // namespace polymoe
