// What instruction sets have for integer products, four neighbouring inputs at a time, and for looking up bytes.
//
// A vector of a tile (tile_layout.h) is 16 outputs by 4 inputs of bytes, level + 128. `Dot` says how it lies in a thread's
// buffer and in what a row of activations is given:
//
//     vpdpbusd    AVX-VNNI or AVX512-VNNI     bytes as they are; rows in 8 bits, or twice 8
//     sdot        Arm's dotprod               bytes - 128; rows in 8 bits, or twice 8
//     vpmaddwd    AVX2                        even and odd bytes in 16 bits; rows in 16 bits
//     mla         any Arm                     32 bits; rows in 16 bits
//
// A row in 16 bits is 254 · high + low: the same numbers in one product. Sums of a group fit: 255 · 32385 · 256 < 2^31.
#pragma once

#include "../tile_layout.h"
#include "vectors.h"

namespace polymoe {

constexpr int BYTES = 4 * W;          // of a vector
constexpr int PARTS = 64 / BYTES;     // vectors of 16 outputs
typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
typedef uint16_t Pairs __attribute__((vector_size(BYTES)));

// Bytes shifted right by less than 8 bits; what comes in from the neighbour is masked away.
inline Bytes shifted(Bytes v, int by, int mask) { return (Bytes)((Pairs)v >> by) & (Bytes)((Pairs{} + 0x0101) * static_cast<uint16_t>(mask)); }
inline Bytes shifted_left(Bytes v, int by) { return (Bytes)((Pairs)v << by); }  // of values that stay below 256

// Level + 128 of codes below 2^BITS, from a format's table of 64.
template <int BITS>
struct Levels {
    static constexpr int TABLES = BITS <= 4 ? 1 : BITS == 5 ? 2 : 4;

#if defined(__AVX2__)
    __m256i table[TABLES];

    explicit Levels(const uint8_t* from) {
        for (int i = 0; i < TABLES; ++i)
            table[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
    }

    Bytes of(Bytes codes) const {
        const __m256i at = (__m256i)codes;
        const auto low = [&](int i) { return _mm256_shuffle_epi8(table[i], _mm256_and_si256(at, _mm256_set1_epi8(15))); };
        if constexpr (TABLES == 1) return (Bytes)_mm256_shuffle_epi8(table[0], at);
        const __m256i bit4 = _mm256_slli_epi16(at, 3), bit5 = _mm256_slli_epi16(at, 2);  // where blending looks
        if constexpr (TABLES == 2) return (Bytes)_mm256_blendv_epi8(low(0), low(1), bit4);
        if constexpr (TABLES == 4)
            return (Bytes)_mm256_blendv_epi8(_mm256_blendv_epi8(low(0), low(1), bit4), _mm256_blendv_epi8(low(2), low(3), bit4), bit5);
    }
#else
    uint8x16_t table[TABLES];

    explicit Levels(const uint8_t* from) {
        for (int i = 0; i < TABLES; ++i) table[i] = vld1q_u8(from + 16 * i);
    }

    Bytes of(Bytes codes) const {
        const uint8x16_t at = (uint8x16_t)codes;
        if constexpr (TABLES == 1) return (Bytes)vqtbl1q_u8(table[0], at);
        if constexpr (TABLES == 2) return (Bytes)vqtbl2q_u8({{table[0], table[1]}}, at);
        if constexpr (TABLES == 4) return (Bytes)vqtbl4q_u8({{table[0], table[1], table[2], table[3]}}, at);
    }
#endif
};

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__ARM_FEATURE_DOTPROD)

struct Dot {
    using Weight = uint8_t;
    using Value = int8_t;
    static constexpr int PASSES = 2;  // of a row in 16 bits
#if defined(__ARM_FEATURE_DOTPROD)
    static constexpr bool WITH_128 = false;  // whether 128 times a row's values must be taken from its sums
#else
    static constexpr bool WITH_128 = true;
#endif

    static void put(Weight* to, int part, Bytes levels) {
        store(to + BYTES * part, WITH_128 ? levels : levels ^ (Bytes{} + 128));
    }

    static void put_values(Value* to, const int32_t* four) {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(four[i]);
    }

    static void add(Ints* sum, const Weight* w, const Value* x) {
        int32_t four;
        memcpy(&four, x, 4);
        const Ints row = four + Ints{};
        for (int part = 0; part < PARTS; ++part) {
            const Bytes weight = load_as<Bytes>(w + BYTES * part);
#if defined(__ARM_FEATURE_DOTPROD)
            sum[part] = (Ints)vdotq_s32((int32x4_t)sum[part], (int8x16_t)weight, (int8x16_t)row);
#elif defined(__AVXVNNI__)
            sum[part] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum[part], (__m256i)weight, (__m256i)row);
#else
            sum[part] = (Ints)_mm256_dpbusd_epi32((__m256i)sum[part], (__m256i)weight, (__m256i)row);
#endif
        }
    }
};

#elif defined(__AVX2__)

struct Dot {
    using Weight = int16_t;
    using Value = int16_t;
    static constexpr int PASSES = 1;
    static constexpr bool WITH_128 = true;

    static void put(Weight* to, int part, Bytes levels) {
        store(to + 16 * part, (Pairs)levels & (Pairs{} + 0xff));
        store(to + 32 + 16 * part, (Pairs)levels >> 8);
    }

    static void put_values(Value* to, const int32_t* four) {
        to[0] = static_cast<int16_t>(four[0]), to[1] = static_cast<int16_t>(four[2]);
        to[2] = static_cast<int16_t>(four[1]), to[3] = static_cast<int16_t>(four[3]);
    }

    static void add(Ints* sum, const Weight* w, const Value* x) {
        const __m256i even = (__m256i)_mm256_broadcast_ss(reinterpret_cast<const float*>(x));
        const __m256i odd = (__m256i)_mm256_broadcast_ss(reinterpret_cast<const float*>(x + 2));
        for (int part = 0; part < PARTS; ++part) {
            const __m256i at_even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16 * part));
            const __m256i at_odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 + 16 * part));
            sum[part] += (Ints)_mm256_madd_epi16(at_even, even);
            sum[part] += (Ints)_mm256_madd_epi16(at_odd, odd);
        }
    }
};

#else

struct Dot {
    using Weight = int32_t;
    using Value = int16_t;
    static constexpr int PASSES = 1;
    static constexpr bool WITH_128 = true;

    static void put(Weight* to, int part, Bytes levels) {
        for (int i = 0; i < 4; ++i) store(to + 16 * i + W * part, (Words)levels >> (8 * i) & 255);
    }

    static void put_values(Value* to, const int32_t* four) {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<int16_t>(four[i]);
    }

    static void add(Ints* sum, const Weight* w, const Value* x) {
        for (int part = 0; part < PARTS; ++part)
            for (int i = 0; i < 4; ++i) sum[part] += load_as<Ints>(w + 16 * i + W * part) * static_cast<int32_t>(x[i]);
    }
};

#endif

}  // namespace polymoe
