// Rows of x times the matrix of their segment: what all products of this folder are, stored, packed or in tiles.
//
//     y_r = (base + sign · delta) x_r + bias        or, paired,        y_r = silu(first half) ∘ second half
//
// A segment has one base, one delta and one sign; a group is all segments of a base. A piece of work is a group and PIECE
// weight rows, in two halves of 16. Of a matrix no more than 16 rows are ever decoded:
//
//     stored in bfloat16           read where they lie
//     in tiles                     multiplied in integers, base and delta each by itself into the same sums (tile_sums.h)
//     anything else                made float32, the base once for all its segments, each delta added to it for its own
#pragma once

#include "../threads.h"
#include "decode.h"
#include "tile_sums.h"

namespace polymoe {

struct Rows : Segment {
    int64_t first, last;
};

// Segments and where groups of them begin, with the end of the last.
struct Segments {
    std::vector<Rows> rows;
    std::vector<int64_t> groups;

    void clear() { rows.clear(), groups.clear(); }
    void add(bool other_base, const Rows& segment) {
        if (other_base) groups.push_back(static_cast<int64_t>(rows.size()));
        rows.push_back(segment);
    }
    void end() { groups.push_back(static_cast<int64_t>(rows.size())); }
    int64_t count() const { return rows.empty() ? 0 : rows.back().last; }
};

// Rows of x as products read them, kept from call to call.
struct Inputs {
    int64_t in, stride;  // stride: floats from one row to the next, zero behind `in`
    std::vector<float> memory;
    const float* values;
    RoundedRows rounded_memory;
    Rounded rounded;

    // bits: that rows are rounded to where they meet tiles, 0 where none do. from(row): its values, of type T.
    template <class From>
    void fill(int64_t rows, int64_t width, int64_t bits, int num_threads, const From& from) {
        in = width, stride = (in + 15) / 16 * 16;
        float* to = aligned(memory, rows * stride);
        values = to;
        if (bits) rounded = rounded_memory.make(rows, in, bits);
        parallel_for(rows, 4, num_threads, [&, to](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) {
                const auto* row = from(r);
                float* at = to + r * stride;
                if constexpr (sizeof *row == 4) memcpy(at, row, in * 4);
                else for (int64_t k = 0; k < in; ++k) at[k] = from_bf16(row[k]);
                for (int64_t k = in; k < stride; ++k) at[k] = 0;
                if (bits) round_row(at, rounded, r);
            }
        });
    }
};

// What one thread works in.
struct Buffers {
    std::vector<float> sums, base, own;
};

template <class Output>  // uint16_t (bfloat16) or float
struct Product {
    int64_t in, out;
    bool paired;  // matrices are [2 * out, in]
    const Stack *bases, *deltas;
    const Inputs& x;
    const float* bias;  // [segments, out], or null
    bool coarse_deltas;
    Output* y;

    int64_t outputs() const { return paired ? 2 * out : out; }
    int64_t step() const { return paired ? LANES : PIECE; }

    void run(const Segments& segments, int num_threads) const {
        const int64_t pieces = (out + step() - 1) / step(), groups = static_cast<int64_t>(segments.groups.size()) - 1;
        const int64_t chunk = std::clamp<int64_t>(groups * pieces / (16 * num_threads), 1, 16);
        parallel_for(groups * pieces, chunk, num_threads, [&](int64_t begin, int64_t end) {
            static thread_local Buffers buffers;
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t g = segments.groups[piece / pieces], last = segments.groups[piece / pieces + 1];
                run_piece(segments.rows.data() + g, last - g, g, piece % pieces * step(), buffers);
            }
        });
    }

private:
    // Outputs o .. o + step of the segments of one base. index: of the first segment.
    void run_piece(const Rows* segments, int64_t count, int64_t index, int64_t o, Buffers& buffers) const {
        const int64_t first = segments[0].first, rows = segments[count - 1].last - first;
        float* sums = aligned(buffers.sums, rows * PIECE);
        memset(sums, 0, rows * PIECE * sizeof(float));
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t at = o + half * LANES;
            if (paired) add_half(segments, count, half * out + o, std::min(LANES, out - o), sums + half * LANES, buffers);
            else if (at < out) add_half(segments, count, at, std::min(LANES, out - at), sums + half * LANES, buffers);
        }
        for (int64_t s = 0; s < count; ++s)
            for (int64_t r = segments[s].first; r < segments[s].last; ++r)
                finish(sums + (r - first) * PIECE, bias ? bias + (index + s) * out + o : nullptr, y + r * out + o,
                       std::min(step(), out - o));
    }

    void finish(const float* sums, const float* of_bias, Output* to, int64_t count) const {
        if constexpr (sizeof(Output) == 2) {
            if (paired) {
                uint16_t active[LANES];
                gated(sums, sums + LANES, active);
                memcpy(to, active, count * sizeof *to);
                return;
            }
            for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(sums[i] + (of_bias ? of_bias[i] : 0));
        } else {
            for (int64_t i = 0; i < count; ++i) to[i] = sums[i] + (of_bias ? of_bias[i] : 0);
        }
    }

    // sums += `count` weight rows from `row` on of all segments of one base.
    void add_half(const Rows* segments, int64_t count, int64_t row, int64_t size, float* sums, Buffers& buffers) const {
        const int64_t start = segments[0].first;
        const Stack& base = bases[segments[0].base.stack];
        const int64_t index = segments[0].base.index;
        const Decoder decoder{outputs(), in, x.stride};
        const float* floats = nullptr;  // of the base, made when it is needed
        const auto made = [&] {
            if (floats) return floats;
            float* to = aligned(buffers.base, LANES * x.stride);
            decoder.rows(base, index, row, size, 1, to);
            return floats = to;
        };
        for (int64_t s = 0; s < count;) {  // the base, for all neighbours that need it by itself
            int64_t end = s;
            while (end < count && !is_joined(segments[end])) ++end;
            if (end > s) {
                const int64_t first = segments[s].first, rows = segments[end - 1].last - first;
                float* its = sums + (first - start) * PIECE;
                if (base.table) add_tile(tile(base, index, 1, row), x.rounded, first, rows, false, its);
                else if (base.kind == STORED && base.type == BF16 && in % 16 == 0) multiply(stored(base, index, row), in, first, rows, size, its);
                else multiply(made(), x.stride, first, rows, size, its);
            }
            s = std::max(end, s + 1);
        }
        for (int64_t s = 0; s < count; ++s) {
            const Rows& own = segments[s];
            if (own.delta.stack < 0) continue;
            const Stack& delta = deltas[own.delta.stack];
            const int64_t rows = own.last - own.first;
            float* its = sums + (own.first - start) * PIECE;
            if (delta.table) {
                add_tile(tile(delta, own.delta.index, own.sign, row), x.rounded, own.first, rows, coarse_deltas, its);
                continue;
            }
            float* weights = aligned(buffers.own, LANES * x.stride);
            if (is_joined(own)) decoder.own(delta, own.delta.index, row, size, own.sign, made(), weights);
            else decoder.rows(delta, own.delta.index, row, size, own.sign, weights);
            multiply(weights, x.stride, own.first, rows, size, its);
        }
    }

    // Whether base and delta are added up before they are multiplied.
    bool is_joined(const Rows& s) const {
        return s.delta.stack >= 0 && !bases[s.base.stack].table && !deltas[s.delta.stack].table;
    }

    template <class Weight>
    void multiply(const Weight* weights, int64_t stride, int64_t first, int64_t rows, int64_t size, float* sums) const {
        dots(x.values + first * x.stride, x.stride, rows, weights, stride, size, std::min(stride, x.stride), sums);
    }

    const uint16_t* stored(const Stack& s, int64_t index, int64_t row) const {
        return reinterpret_cast<const uint16_t*>(s.data) + (index * outputs() + row) * in;
    }

    // The tile whose first output is `row`.
    Tile tile(const Stack& s, int64_t index, float sign, int64_t row) const {
        const int64_t at = (index * outputs() + row) / LANES;
        return {s.kind, s.data + at * in * LANES * s.kind / 8, s.scales + at * x.rounded.groups * LANES, s.table, s.step * sign};
    }
};

}  // namespace polymoe
