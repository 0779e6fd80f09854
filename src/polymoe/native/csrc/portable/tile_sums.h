// Rows of activations in integers times packed matrices in tiles.
//
//     y = step · s_w · s_x · (Σ byte · x  −  128 Σ x)        for each group, and summed over groups in float32
//
// A group of a tile (16 outputs, 256 inputs at most) is unpacked once into a thread's buffer for all rows that meet it.
#pragma once

#include <algorithm>

#include "dot_products.h"
#include "dots.h"

namespace polymoe {

// Rows of activations as `Dot` multiplies them.
struct Rounded {
    Dot::Value* values;  // [PASSES, rows, in]
    float* scales;       // [rows, groups]
    int32_t* sums;       // [PASSES, rows, groups]: 128 Σ of values
    int64_t rows, in, groups, group;
    bool in_16_bits;

    int passes() const { return in_16_bits ? Dot::PASSES : 1; }
};

// Memory of them, kept from call to call.
struct RoundedRows {
    std::vector<Dot::Value> values;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    Rounded make(int64_t rows, int64_t in, int64_t bits) {
        const int64_t group = group_of(in), groups = (in + group - 1) / group;
        const auto grow = [](auto& buffer, int64_t size) { if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size); };
        grow(values, Dot::PASSES * rows * in), grow(scales, rows * groups), grow(sums, Dot::PASSES * rows * groups);
        return {values.data(), scales.data(), sums.data(), rows, in, groups, group, bits == 16};
    }
};

// x [in] -> row `row` of `to`.
inline void round_row(const float* x, const Rounded& to, int64_t row) {
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number
    for (int64_t g = 0; g < to.groups; ++g) {
        const int64_t first = g * to.group, last = std::min(first + to.group, to.in);
        float largest = 0;
        for (int64_t k = first; k < last; ++k) {
            const float size = x[k] < 0 ? -x[k] : x[k];
            largest = size > largest ? size : largest;
        }
        const float ratio = largest > 0 ? 127 / largest : 0;
        const bool joined = to.in_16_bits && Dot::PASSES == 1;
        to.scales[row * to.groups + g] = largest / 127 / (joined ? LOW_STEPS : 1);
        int32_t high[MOST_GROUP], low[MOST_GROUP], sums[2] = {0, 0};
        for (int64_t k = first; k < last; ++k) {
            const float value = x[k] * ratio, whole = (value + magic) - magic;
            high[k - first] = static_cast<int32_t>(whole);
            low[k - first] = static_cast<int32_t>(((value - whole) * LOW_STEPS + magic) - magic);
        }
        for (int64_t i = 0; joined && i < last - first; ++i) high[i] = high[i] * static_cast<int32_t>(LOW_STEPS) + low[i];
        for (int64_t i = 0; i < last - first; ++i) sums[0] += high[i], sums[1] += low[i];
        for (int pass = 0; pass < to.passes(); ++pass) {
            Dot::Value* at = to.values + (pass * to.rows + row) * to.in + first;
            for (int64_t i = 0; i < last - first; i += 4) Dot::put_values(at + i, (pass ? low : high) + i);
            to.sums[(pass * to.rows + row) * to.groups + g] = 128 * sums[pass];
        }
    }
}

// One tile of a packed matrix.
struct Tile {
    int64_t bits;
    const uint8_t* codes;
    const uint16_t* scales;  // [groups][16]
    const uint8_t* table;
    float step;  // sign in it
};

// A unit's codes -> eight vectors in `to`.
template <int BITS>
inline const uint8_t* unpack_unit(const uint8_t* codes, const Levels<BITS>& levels, Dot::Weight* to) {
    constexpr int WIDE = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, NARROW = BITS - WIDE;
    for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 8
        for (int q = 0; q < VECTORS; ++q) {
            Bytes code = load_as<Bytes>(codes + 64 * (q * WIDE / 8) + BYTES * part);
            if constexpr (BITS < 8) code = shifted(code, q * WIDE % 8, (1 << WIDE) - 1);
            if constexpr (NARROW > 0) {
                const Bytes above = load_as<Bytes>(codes + 64 * (WIDE + q * NARROW / 8) + BYTES * part);
                code |= shifted_left(shifted(above, q * NARROW % 8, (1 << NARROW) - 1), WIDE);
            }
            if constexpr (BITS < 8) code = levels.of(code);
            Dot::put(to + 64 * q, part, code);
        }
    }
    return codes + 64 * BITS;
}

template <int BITS>
inline const uint8_t* unpack(const uint8_t* codes, int64_t units, const uint8_t* table, Dot::Weight* to) {
    const Levels<BITS> levels(table);
    for (int64_t u = 0; u < units; ++u, to += 64 * VECTORS) codes = unpack_unit<BITS>(codes, levels, to);
    return codes;
}

inline const uint8_t* unpack(int64_t bits, const uint8_t* codes, int64_t units, const uint8_t* table, Dot::Weight* to) {
    switch (bits) {
        case 1: return unpack<1>(codes, units, table, to);
        case 2: return unpack<2>(codes, units, table, to);
        case 3: return unpack<3>(codes, units, table, to);
        case 4: return unpack<4>(codes, units, table, to);
        case 5: return unpack<5>(codes, units, table, to);
        case 6: return unpack<6>(codes, units, table, to);
        default: return unpack<8>(codes, units, table, to);
    }
}

// R rows from `row` on times one group, 16 outputs -> added to sums [R][PIECE]. scale: [16], of the weights.
template <int R>
inline void group_rows(const Dot::Weight* weights, const Rounded& x, int64_t row, int64_t g, int passes, const float* scale,
                       float* sums) {
    const int64_t first = g * x.group, vectors = std::min(x.group, x.in - first) / 4;
    for (int pass = 0; pass < passes; ++pass) {
        Ints total[R][PARTS];
        for (auto& row : total)
            for (auto& sum : row) sum = Ints{};
        const Dot::Value* values = x.values + (pass * x.rows + row) * x.in + first;
        for (int64_t v = 0; v < vectors; ++v)
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) Dot::add(total[r], weights + 64 * v, values + r * x.in + 4 * v);
        for (int r = 0; r < R; ++r) {
            const int32_t less = Dot::WITH_128 ? x.sums[(pass * x.rows + row + r) * x.groups + g] : 0;
            const float of_row = x.scales[(row + r) * x.groups + g] / (pass ? LOW_STEPS : 1);
            for (int part = 0; part < PARTS; ++part) {
                float* to = sums + r * PIECE + W * part;
                const Floats value = __builtin_convertvector(total[r][part] - less, Floats);
                store(to, load(to) + value * (load(scale + W * part) * of_row));
            }
        }
    }
}

// sums [rows][PIECE] += rows first .. first + count of x times a tile's 16 outputs. coarse: by their first 8 bits, where
// leaving out the others saves time.
inline void add_tile(const Tile& tile, const Rounded& x, int64_t first, int64_t count, bool coarse, float* sums) {
    static thread_local std::vector<Dot::Weight> buffer;
    Dot::Weight* weights = aligned(buffer, MOST_GROUP * LANES);
    const uint8_t* codes = tile.codes;
    const int passes = coarse ? 1 : x.passes();
    for (int64_t g = 0; g < x.groups; ++g) {
        codes = unpack(tile.bits, codes, std::min(x.group, x.in - g * x.group) / UNIT, tile.table, weights);
        float scale[LANES];
        for (int i = 0; i < LANES; ++i) scale[i] = tile.step * from_bf16(tile.scales[g * LANES + i]);
        for (int64_t r = 0; r < count;) {
            float* to = sums + r * PIECE;
            const int64_t left = count - r, taken = left >= 6 ? (left == 8 || left == 7 ? 4 : 6) : left;
            switch (taken) {
                case 6: group_rows<6>(weights, x, first + r, g, passes, scale, to); break;
                case 5: group_rows<5>(weights, x, first + r, g, passes, scale, to); break;
                case 4: group_rows<4>(weights, x, first + r, g, passes, scale, to); break;
                case 3: group_rows<3>(weights, x, first + r, g, passes, scale, to); break;
                case 2: group_rows<2>(weights, x, first + r, g, passes, scale, to); break;
                case 1: group_rows<1>(weights, x, first + r, g, passes, scale, to); break;
            }
            r += taken;
        }
    }
}

}  // namespace polymoe
