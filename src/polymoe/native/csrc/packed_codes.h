// Rows of packed matrices back to values: scaled codes of 1 to 8 bits, and lossless deltas over stored rows.
//
// Layout and levels are those of polymoe/quant/formats.py. A step is 32 neighbouring values: their codes lie in one block
// of each plane at one shift, so widening a block's bytes to 16 bits and shifting gives a step's codes in order. They
// index a table of levels already multiplied by the group's scale, which is made once a group. Eight steps, 256 values,
// start at a block of every plane; what is left of a row finds each value by itself, as its last blocks are shorter.
#pragma once

#include <string.h>

#include "bf16.h"
#include "stacks.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

template <int KIND>
struct Planes {
    static constexpr int BITS = KIND == FP8 ? 8 : KIND;
    static constexpr int WIDE = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, NARROW = BITS - WIDE;
};

// Where the values of a row's last steps are, for a plane of each width (at [log2 of it]): a byte of a block and a shift.
struct Tail {
    struct Step {
        alignas(64) uint16_t byte[32], shift[32];
        int64_t offset;
        __mmask32 valid;
    };
    Step steps[4][8];

    explicit Tail(int64_t in) {
        for (int plane = 0; plane < 4; ++plane)
            for (int64_t k = in / 256 * 256, t = 0; k < in; k += 32, ++t) {
                const int64_t width = 1 << plane, unit = 256 / width, block = k / unit;
                const int64_t bytes = block < in / unit ? 32 : (in % unit * width + 7) / 8;
                Step& step = steps[plane][t];
                for (int64_t i = 0; i < 32; ++i) {
                    step.byte[i] = static_cast<uint16_t>((k % unit + i) % bytes);
                    step.shift[i] = static_cast<uint16_t>((k % unit + i) / bytes * width);
                }
                step.offset = block * 32;
                step.valid = bytes == 32 ? ~0u : (1u << bytes) - 1;
            }
    }
};

// The codes of steps: 32 lanes of 16 bits. Bits above the format's are rubbish that look-ups do not see.
template <int KIND>
struct Codes {
    using P = Planes<KIND>;
    static constexpr int WIDE = P::WIDE, NARROW = P::NARROW;
    const uint8_t *wide, *narrow;
    __m512i low[WIDE], high[NARROW + 1];  // the blocks of 256 values

    Codes(const uint8_t* row, int64_t in) : wide(row), narrow(row + (in * WIDE + 7) / 8) {}

    // The blocks of values 256 b … 256 b + 255, and into the cache what lies `ahead` bytes further.
    void load(int64_t b, int64_t ahead) {
        for (int i = 0; i < WIDE; ++i) low[i] = block(wide + (b * WIDE + i) * 32, i % 2 == 0, ahead);
        for (int i = 0; i < NARROW; ++i) high[i] = block(narrow + (b * NARROW + i) * 32, i % 2 == 0, ahead);
    }

    // Step t of the 256 values that were loaded.
    __m512i at(int t) const {
        const __m512i bits = _mm512_srli_epi16(low[t * WIDE / 8], t * WIDE % 8);
        if constexpr (NARROW == 0) return bits;
        const int shift = t * NARROW % 8 - WIDE;
        const __m512i above = high[t * NARROW / 8];
        return join(bits, shift < 0 ? _mm512_slli_epi16(above, -shift) : _mm512_srli_epi16(above, shift));
    }

    // Step t of what is left of the row.
    __m512i at(const Tail& tail, int t) const {
        const __m512i bits = place(wide, tail.steps[log2_of(WIDE)][t]);
        if constexpr (NARROW == 0) return bits;
        return join(bits, _mm512_slli_epi16(place(narrow, tail.steps[log2_of(NARROW)][t]), WIDE));
    }

private:
    static constexpr int log2_of(int width) { return width == 8 ? 3 : width == 4 ? 2 : width == 2 ? 1 : 0; }

    static __m512i join(__m512i bits, __m512i above) {  // `above` is where it belongs
        return _mm512_ternarylogic_epi32(_mm512_set1_epi16((1 << WIDE) - 1), bits, above, 0xca);
    }

    static __m512i block(const uint8_t* at, bool line, int64_t ahead) {
        if (line) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }

    static __m512i place(const uint8_t* plane, const Tail::Step& step) {
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(step.valid, plane + step.offset));
        return _mm512_srlv_epi16(_mm512_permutexvar_epi16(_mm512_load_si512(step.byte), bytes), _mm512_load_si512(step.shift));
    }
};

// 32 values in float32, apart so that a step's codes need no widening: those at even places, those at odd ones.
struct Floats {
    __m512 even, odd;

    Floats operator+(const Floats& other) const { return {_mm512_add_ps(even, other.even), _mm512_add_ps(odd, other.odd)}; }
    static Floats load(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }

    static Floats of_bf16(const uint16_t* from) {
        const __m512i both = _mm512_loadu_si512(from);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    }

    void store(float* to) const {
        _mm512_storeu_ps(to, even);
        _mm512_storeu_ps(to + 16, odd);
    }

    // 32 bfloat16 in order.
    __m512i rounded() const {
        alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
};

// Codes -> scaled levels. Tables of 16 float32 or 32 bfloat16 levels; the compiler drops what a loop does not use.
template <int KIND>
struct Values {
    static constexpr int TABLES = KIND == INT8 ? 0 : KIND == FP8 ? 8 : KIND == 6 ? 4 : 2;
    const float* levels;
    __m512 scale, table[TABLES + 1];
    __m512i rounded[4];

    explicit Values(const float* levels) : levels(levels) {}

    void set_scale(float value) {
        scale = _mm512_set1_ps(value);
        for (int i = 0; i < TABLES; ++i) table[i] = _mm512_mul_ps(scale, _mm512_loadu_ps(levels + 16 * i));
        for (int i = 0; i < TABLES / 2; ++i) rounded[i] = (__m512i)_mm512_cvtne2ps_pbh(table[2 * i + 1], table[2 * i]);
    }

    Floats floats(__m512i codes) const { return {look_up(codes), look_up(_mm512_srli_epi32(codes, 16))}; }

    __m512i bf16(__m512i codes) const {
        if constexpr (KIND == INT8) return floats(codes).rounded();
        else if constexpr (KIND == FP8) {
            const __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)),
                                                         _mm512_permutex2var_epi16(rounded[0], codes, rounded[1]),
                                                         _mm512_permutex2var_epi16(rounded[2], codes, rounded[3]));
            const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
            return _mm512_xor_si512(size, sign);
        } else if constexpr (KIND == 6) return _mm512_permutex2var_epi16(rounded[0], codes, rounded[1]);
        else return _mm512_permutexvar_epi16(codes, rounded[0]);
    }

private:
    __m512 look_up(__m512i codes) const {  // what lies above the lower 16 bits is rubbish
        if constexpr (KIND == INT8) {
            const __m512i code = _mm512_and_si512(codes, _mm512_set1_epi32(0xff));
            return _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128))));
        } else if constexpr (KIND == FP8) {  // sign, exponent and fraction of e4m3 where float32 has them are the value / 2^120
            const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 24);
            const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)), 20);
            const __m512 small = _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
            return _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_set1_ps(0x1p120f), small));
        } else if constexpr (KIND == 6) {
            return _mm512_mask_blend_ps(_mm512_test_epi32_mask(codes, _mm512_set1_epi32(32)),
                                        _mm512_permutex2var_ps(table[0], codes, table[1]),
                                        _mm512_permutex2var_ps(table[2], codes, table[3]));
        } else if constexpr (KIND == 5) {
            return _mm512_permutex2var_ps(table[0], codes, table[1]);
        } else {
            return _mm512_permutexvar_ps(codes, table[0]);
        }
    }
};

// One row, step by step: put(first value of the step, values, codes). `ahead` bytes further lies what is needed next.
template <int KIND, class Put>
inline void decode_row(const Stack& s, const Tail& tail, const uint8_t* row, const uint16_t* scales, int64_t in, float sign,
                       int64_t ahead, Put put) {
    Codes<KIND> codes(row, in);
    Values<KIND> values(s.levels);
    const int64_t whole = in / 256;
    if (s.group == 256) {
        for (int64_t b = 0; b < whole; ++b) {
            codes.load(b, ahead);
            values.set_scale(sign * from_bf16(scales[b]));
#pragma GCC unroll 8
            for (int t = 0; t < 8; ++t) put(256 * b + 32 * t, values, codes.at(t));
        }
    } else {
        int64_t next = 0;  // where the next group starts
        for (int64_t b = 0; b < whole; ++b) {
            codes.load(b, ahead);
#pragma GCC unroll 8
            for (int t = 0; t < 8; ++t) {
                const int64_t k = 256 * b + 32 * t;
                if (t % 2 == 0 && k == next) values.set_scale(sign * from_bf16(*scales++)), next += s.group;
                put(k, values, codes.at(t));
            }
        }
        scales -= next / s.group;
    }
    for (int64_t k = 256 * whole; k < in; k += 32) {
        if (k == 256 * whole || k % s.group == 0) values.set_scale(sign * from_bf16(scales[k / s.group]));
        put(k, values, codes.at(tail, static_cast<int>(k / 32 % 8)));
    }
}

// Calls f(the kind as a type); not for kinds without codes.
template <int KIND>
struct Kind {
    static constexpr int value = KIND;
};

template <class F>
inline void with_kind(int64_t kind, F f) {
    switch (kind) {
        case 1: f(Kind<1>()); break;
        case 2: f(Kind<2>()); break;
        case 3: f(Kind<3>()); break;
        case 4: f(Kind<4>()); break;
        case 5: f(Kind<5>()); break;
        case 6: f(Kind<6>()); break;
        case INT8: f(Kind<INT8>()); break;
        case FP8: f(Kind<FP8>()); break;
    }
}

// Rows first .. first + count of entry `index`, [entries, outputs, in], times sign -> bfloat16 [count, in].
inline void decode_bf16(const Stack& s, const Tail& tail, int64_t index, int64_t outputs, int64_t in, int64_t first,
                        int64_t count, float sign, uint16_t* to) {
    const int64_t groups = (in + s.group - 1) / s.group;
    with_kind(s.kind, [&](auto kind) {
        for (int64_t r = 0; r < count; ++r, to += in) {
            const int64_t row = index * outputs + first + r;
            decode_row<decltype(kind)::value>(s, tail, s.data + row * s.row_bytes, s.scales + row * groups, in, sign,
                                              count * s.row_bytes, [to](int64_t k, const auto& values, __m512i codes) {
                                                  _mm512_storeu_si512(to + k, values.bf16(codes));
                                              });
        }
    });
}

// The same in float32, 32 values apart as `Floats` has them.
inline void decode_floats(const Stack& s, const Tail& tail, int64_t index, int64_t outputs, int64_t in, int64_t first,
                          int64_t count, float* to) {
    const int64_t groups = (in + s.group - 1) / s.group;
    with_kind(s.kind, [&](auto kind) {
        for (int64_t r = 0; r < count; ++r, to += in) {
            const int64_t row = index * outputs + first + r;
            decode_row<decltype(kind)::value>(s, tail, s.data + row * s.row_bytes, s.scales + row * groups, in, 1,
                                              count * s.row_bytes, [to](int64_t k, const auto& values, __m512i codes) {
                                                  values.floats(codes).store(to + k);
                                              });
        }
    });
}

// base + sign · the same of a delta, rounded once -> bfloat16 [count, in]. base: [count, in] from decode_floats.
inline void add_to_base(const Stack& s, const Tail& tail, int64_t index, int64_t outputs, int64_t in, int64_t first,
                        int64_t count, float sign, const float* base, uint16_t* to) {
    const int64_t groups = (in + s.group - 1) / s.group;
    with_kind(s.kind, [&](auto kind) {
        for (int64_t r = 0; r < count; ++r, base += in, to += in) {
            const int64_t row = index * outputs + first + r;
            decode_row<decltype(kind)::value>(
                s, tail, s.data + row * s.row_bytes, s.scales + row * groups, in, sign, count * s.row_bytes,
                [base, to](int64_t k, const auto& values, __m512i codes) {
                    _mm512_storeu_si512(to + k, (values.floats(codes) + Floats::load(base + k)).rounded());
                });
        }
    });
}

inline int64_t count_bits(const uint8_t* bytes, int64_t count) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, 8);
        total += __builtin_popcountll(word);
    }
    for (; i < count; ++i) total += __builtin_popcount(bytes[i]);
    return total;
}

// Rows first .. first + count of the variant that differs from `base` (those rows, stored) by lossless delta `index`.
inline void replace_rows(const Stack& s, int64_t index, int64_t outputs, int64_t in, int64_t first, int64_t count,
                         const uint16_t* base, uint16_t* to) {
    const uint8_t* bitmap = s.data + index * outputs * s.row_bytes;
    const int64_t mark = first / MARK_ROWS;
    const uint16_t* values = s.values + s.starts[index] + s.marks[index * s.num_marks + mark];
    values += count_bits(bitmap + mark * MARK_ROWS * s.row_bytes, first % MARK_ROWS * s.row_bytes);
    for (int64_t r = first; r < first + count; ++r, base += in, to += in)
        for (int64_t k = 0; k < in; k += 16) {
            uint16_t bits;
            memcpy(&bits, bitmap + r * s.row_bytes + k / 8, 2);
            const int changed = __builtin_popcount(bits);
            const __m512i own = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << changed) - 1), values));
            const __m512i old = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + k)));
            const __m512i all = _mm512_mask_expand_epi32(old, bits, own);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm512_cvtepi32_epi16(all));
            values += changed;
        }
}

}  // inline namespace
}  // namespace polymoe
