// Rows of packed or stored matrices as float32: scaled codes of 1 to 8 bits, and lossless deltas over stored rows.
//
// Layout and levels are those of polymoe/quant/formats.py: a plane of a width of bits is blocks of 32 bytes, byte i % 32 of
// which has value i of the block at bit i / 32 · width; a row's last block may be shorter.
#pragma once

#include "../stacks.h"
#include "vectors.h"

namespace polymoe {

inline int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

// IEEE's 16 bits; without branches. The exponent is moved, what has none (subnormal numbers) is made exact by the product.
inline float from_half(uint16_t half) {
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13, sign = static_cast<uint32_t>(half & 0x8000) << 16;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign | ((half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0);
    memcpy(&value, &bits, 4);
    return value;
}

// `count` values of a type -> float32.
inline void widen(int64_t type, const uint8_t* from, int64_t count, float* to) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    if (type == FLOAT32) memcpy(to, from, count * 4);
    else if (type == FLOAT16) for (int64_t i = 0; i < count; ++i) to[i] = from_half(halves[i]);
    else for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(halves[i]);
}

// The codes of one plane, `shift` bits up, joined to what is in `codes` [in].
template <int WIDTH>
inline void add_plane(const uint8_t* plane, int64_t in, int shift, uint8_t* codes) {
    constexpr int64_t IN_BYTE = 8 / WIDTH, UNIT = 32 * IN_BYTE;
    constexpr uint8_t MASK = (1 << WIDTH) - 1;
    int64_t start = 0;
    for (; start + UNIT <= in; start += UNIT, plane += 32)
        for (int64_t j = 0; j < IN_BYTE; ++j)
            for (int64_t i = 0; i < 32; ++i)
                codes[start + 32 * j + i] |= static_cast<uint8_t>((plane[i] >> (j * WIDTH) & MASK) << shift);
    const int64_t left = in - start, bytes = (left * WIDTH + 7) / 8;
    for (int64_t i = 0; i < left; ++i)
        codes[start + i] |= static_cast<uint8_t>((plane[i % bytes] >> (i / bytes * WIDTH) & MASK) << shift);
}

inline void unpack_row(int64_t kind, const uint8_t* row, int64_t in, uint8_t* codes) {
    if (kind == INT8 || kind == FP8) {
        memcpy(codes, row, in);
        return;
    }
    memset(codes, 0, in);
    const auto narrow = [&](int64_t width) { return row + (in * width + 7) / 8; };  // behind the plane of this width
    switch (kind) {
        case 1: return add_plane<1>(row, in, 0, codes);
        case 2: return add_plane<2>(row, in, 0, codes);
        case 3: return add_plane<2>(row, in, 0, codes), add_plane<1>(narrow(2), in, 2, codes);
        case 4: return add_plane<4>(row, in, 0, codes);
        case 5: return add_plane<4>(row, in, 0, codes), add_plane<1>(narrow(4), in, 4, codes);
        case 6: return add_plane<4>(row, in, 0, codes), add_plane<2>(narrow(4), in, 4, codes);
    }
}

// Of a table of 2^BITS: table[codes[0 .. W]].
template <int BITS>
inline Floats look_up(const float* table, const uint8_t* codes) {
#if defined(__AVX2__)
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const auto among = [&](int i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8 * i), at); };
    if constexpr (BITS <= 3) return (Floats)among(0);
    if constexpr (BITS == 4) return (Floats)_mm256_blendv_ps(among(0), among(1), (__m256)_mm256_slli_epi32(at, 28));
    return (Floats)_mm256_i32gather_ps(table, at, 4);
#else
    return Floats{table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
#endif
}

template <int BITS>
inline void look_up_all(const float* table, const uint8_t* codes, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, look_up<BITS>(table, codes + i));
    for (; i < count; ++i) to[i] = table[codes[i]];
}

// `count` values of one scale.
inline void scaled(const Stack& s, const uint8_t* codes, int64_t count, float scale, float* to) {
    if (s.kind == INT8) {
        for (int64_t i = 0; i < count; ++i) to[i] = scale * static_cast<float>(codes[i] - 128);
    } else if (s.kind == FP8) {  // levels are without sign
        for (int64_t i = 0; i < count; ++i) to[i] = (codes[i] & 128 ? -scale : scale) * s.levels[codes[i] & 127];
    } else {
        float table[64];
        for (int i = 0; i < 64; ++i) table[i] = scale * s.levels[i];
        if (s.kind <= 3) look_up_all<3>(table, codes, count, to);
        else if (s.kind == 4) look_up_all<4>(table, codes, count, to);
        else look_up_all<6>(table, codes, count, to);
    }
}

// Matrices [entries, outputs, in] of pools, and where their rows go: `stride` floats apart, zero behind `in`.
struct Decoder {
    int64_t outputs, in, stride;

    // Rows first .. first + count of entry `index`, stored or packed, times sign.
    void rows(const Stack& s, int64_t index, int64_t first, int64_t count, float sign, float* to) const {
        for (int64_t r = 0; r < count; ++r, to += stride) {
            const int64_t row = index * outputs + first + r;
            if (s.kind == STORED) widen(s.type, s.data + row * in * size_of(s.type), in, to);
            else packed(s, row, sign, to);
            for (int64_t k = in; k < stride; ++k) to[k] = 0;
        }
    }

    // base + sign · the same rows of a delta, or what a lossless delta makes of the base. base, to: [count, stride].
    void own(const Stack& delta, int64_t index, int64_t first, int64_t count, float sign, const float* base, float* to) const {
        if (delta.kind == EXACT) return replaced(delta, index, first, count, base, to);
        rows(delta, index, first, count, sign, to);
        for (int64_t i = 0; i < count * stride; i += W) store(to + i, load(to + i) + load(base + i));
    }

private:
    void packed(const Stack& s, int64_t row, float sign, float* to) const {
        static thread_local std::vector<uint8_t> codes;
        if (static_cast<int64_t>(codes.size()) < in) codes.resize(in);
        unpack_row(s.kind, s.data + row * s.row_bytes, in, codes.data());
        const uint16_t* scales = s.scales + row * ((in + s.group - 1) / s.group);
        for (int64_t k = 0; k < in; k += s.group)
            scaled(s, codes.data() + k, std::min(s.group, in - k), sign * from_bf16(*scales++), to + k);
    }

    void replaced(const Stack& s, int64_t index, int64_t first, int64_t count, const float* base, float* to) const {
        const uint8_t* bitmap = s.data + index * outputs * s.row_bytes;
        const int64_t mark = first / MARK_ROWS;
        int64_t before = s.starts[index] + s.marks[index * s.num_marks + mark];
        for (int64_t i = mark * MARK_ROWS * s.row_bytes; i < first * s.row_bytes; ++i) before += __builtin_popcount(bitmap[i]);
        const uint8_t* values = reinterpret_cast<const uint8_t*>(s.values) + before * size_of(s.type);
        memcpy(to, base, count * stride * sizeof(float));
        for (int64_t r = first; r < first + count; ++r, to += stride)
            for (int64_t byte = 0; byte < s.row_bytes; ++byte)
                for (unsigned bits = bitmap[r * s.row_bytes + byte]; bits; bits &= bits - 1, values += size_of(s.type))
                    widen(s.type, values, 1, to + 8 * byte + __builtin_ctz(bits));
    }
};

}  // namespace polymoe
