// One product of packed experts in tiles: all segments of a layer's rows, for gate and up or for down.
//
// A segment has one base, one delta and one sign; a group is all segments of a base. A piece of work is a group and 32
// weight rows: the base's tiles are decoded once for all rows of the group, whatever their variant, each delta's once for
// its own rows, and both are added up in float32 before the activation. A segment of many rows has its own weights made
// once, base and delta in one: in bytes, which take half the time, where activations have 8 bits and base and delta are so
// coarse that rounding their sum once more adds next to nothing, else in bfloat16, with a product as stored weights have it.
//
// What is no tile (stored weights, lossless deltas, formats with other levels) is made bfloat16, 16 rows at a time.
#pragma once

#include "linear.h"
#include "packed_codes.h"
#include "tile_pairs.h"

namespace polymoe {

// How a segment is multiplied: base and delta each by itself, or made one matrix, in bfloat16 or in bytes.
enum class Way { APART, PAIRS, BYTES };

struct Rows : Segment {
    int64_t first, last;
    Way way;
};

// Rows of activations as the products read them.
struct Inputs {
    const uint16_t* values;  // [rows, in]
    Rounded rounded;
};

// What one thread works in.
struct Buffers {
    std::vector<float> sums, scales;
    std::vector<uint16_t> rows;
    std::vector<uint32_t> pairs, packed;
    std::vector<uint8_t> bytes, summed;
};

// R rows times 16 outputs in pairs of inputs [in / 2][16].
template <int R>
void pair_rows(const uint32_t* pairs, const uint16_t* x, int64_t in, float* to, int64_t stride) {
    __m512 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = _mm512_loadu_ps(to + r * stride);
    for (int64_t k = 0; k < in / 2; ++k) {
        const __m512bh w = (__m512bh)_mm512_load_si512(pairs + 16 * k);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i both = four_bytes(reinterpret_cast<const int8_t*>(x + r * in + 2 * k));
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)both, w);
        }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(to + r * stride, sum[r]);
}

constexpr int64_t PIECE = WEIGHT_ROWS;  // weight rows of a piece of work: 16 outputs of each half when paired, else 32
constexpr int64_t MANY_ROWS = 32;       // from here on a segment's weights are made one matrix (measured on Zen 4),
constexpr int64_t MANY_FOR_BYTES = 16;  // or from here on, where it is of bytes
constexpr int64_t COARSE = 6;           // bits of base and delta: the error left is 16 times that of rounding to bytes

// How `count` rows of a segment are multiplied. bits: of their activations. A packed base alone stays apart: 8-bit
// products take half the time of bfloat16.
inline Way way_of(const Segment& s, int64_t count, int64_t bits, const Stack* bases, const Stack* deltas) {
    if (count < MANY_FOR_BYTES) return Way::APART;
    const Stack& base = bases[s.base.stack];
    if (s.delta.stack < 0) return base.kind == STORED && count >= MANY_ROWS ? Way::PAIRS : Way::APART;
    const Stack& delta = deltas[s.delta.stack];
    const bool tiles = base.table && delta.table && base.group == delta.group;
    if (tiles && bits == 8 && base.kind + delta.kind <= COARSE) return Way::BYTES;
    return (tiles || delta.kind == EXACT) && count >= MANY_ROWS ? Way::PAIRS : Way::APART;
}

// One product of all segments: y [rows, out] from inputs and matrices [outputs, in].
struct Product {
    int64_t in, out;
    bool paired;  // matrices are [2 * out, in], and y = silu(first half) * second half
    const Stack *bases, *deltas;
    const Inputs& x;
    const Tail& tail;
    uint16_t* y;
    bool coarse_deltas;  // whether deltas are multiplied by the first 8 bits of activations only

    int64_t outputs() const { return paired ? 2 * out : out; }

    // The problem as stored weights have it, for segments of many rows. starts: where each segment's rows start.
    Problem problem(const std::vector<int64_t>& starts) const {
        return {x.values, nullptr, in, out, static_cast<int64_t>(starts.size()) - 1, starts.data(), nullptr, nullptr, paired, y};
    }

    // The tile with output o of entry `index`.
    TileOf tile(const Stack& stack, int64_t index, float sign, int64_t o) const {
        const int64_t groups = (in + stack.group - 1) / stack.group, at = (index * outputs() + o) / LANES;
        const int64_t bytes = in * LANES * stack.kind / 8;
        return {stack.data + at * bytes, stack.scales + at * groups * LANES, stack.table, stack.step * sign, stack.group,
                bytes, groups * LANES};
    }

    const uint16_t* stored(const Stack& stack, int64_t index, int64_t o) const {
        return reinterpret_cast<const uint16_t*>(stack.data) + (index * outputs() + o) * in;
    }

    // sums [rows, PIECE] += rows o .. o + 16 of the matrix times rows first .. last of x.
    void add(const Stack& stack, int64_t index, float sign, int64_t o, int64_t first, int64_t last, bool coarse,
             float* sums, Buffers& buffers) const {
        if (stack.table) {
            Rounded rows = x.rounded.from(first);
            if (coarse) rows.low = nullptr;
            return tile_rows(stack.kind, tile(stack, index, sign, o), rows, last - first, sums, PIECE);
        }
        const uint16_t* rows = stored(stack, index, o);
        if (stack.kind != STORED) {
            uint16_t* decoded = aligned(buffers.rows, LANES * in);
            decode_bf16(stack, tail, index, outputs(), in, o, LANES, sign, decoded);
            rows = decoded;
        }
        add_values(rows, first, last, sums, buffers);
    }

    // Rows o .. o + 16 of what a lossless delta makes of its base.
    const uint16_t* exact_rows(const Segment& s, int64_t o, Buffers& buffers) const {
        uint16_t* own = aligned(buffers.rows, LANES * in);
        const uint16_t* under = stored(bases[s.base.stack], s.base.index, o);
        replace_rows(deltas[s.delta.stack], s.delta.index, outputs(), in, o, LANES, under, own);
        return own;
    }

    void add_values(const uint16_t* rows, int64_t first, int64_t last, float* sums, Buffers& buffers) const {
        uint32_t* pairs = aligned(buffers.pairs, in / 2 * LANES);
        pack_weights(rows, in, LANES, pairs, LANES);
        const int64_t count = last - first, blocks = (count + 11) / 12, most = (count + blocks - 1) / blocks;
        for (int64_t r = 0; r < count; r += most) {
            const uint16_t* from = x.values + (first + r) * in;
            float* to = sums + r * PIECE;
            switch (std::min(most, count - r)) {
#define POLYMOE_ROWS(R) \
    case R: pair_rows<R>(pairs, from, in, to, PIECE); break;
                POLYMOE_ROWS(1) POLYMOE_ROWS(2) POLYMOE_ROWS(3) POLYMOE_ROWS(4) POLYMOE_ROWS(5) POLYMOE_ROWS(6)
                POLYMOE_ROWS(7) POLYMOE_ROWS(8) POLYMOE_ROWS(9) POLYMOE_ROWS(10) POLYMOE_ROWS(11) POLYMOE_ROWS(12)
#undef POLYMOE_ROWS
            }
        }
    }

    bool is_exact(const Segment& s) const { return s.delta.stack >= 0 && deltas[s.delta.stack].kind == EXACT; }

    // Weights of the segment for outputs o .. o + 16 of a half. bytes: of the base, made where it is null.
    void make_pairs(const Rows& s, int64_t o, uint8_t*& bytes, uint8_t* room, uint32_t* to, Buffers& buffers) const {
        const Stack& base = bases[s.base.stack];
        if (!base.table) {
            const uint16_t* rows = is_exact(s) ? exact_rows(s, o, buffers) : stored(base, s.base.index, o);
            return pack_weights(rows, in, LANES, to, PIECE);
        }
        const TileOf of_base = tile(base, s.base.index, 1, o);
        if (!bytes) unpack_tile(base.kind, of_base, in, bytes = room);
        const Stack& delta = deltas[s.delta.stack];
        sum_pairs(delta.kind, bytes, of_base, tile(delta, s.delta.index, s.sign, o), in, to, PIECE);
    }

    // sums [rows of the segment, PIECE] += outputs o .. o + 16 of a half. bytes: as above.
    void add_summed(const Rows& s, int64_t o, uint8_t*& bytes, uint8_t* room, float* sums, Buffers& buffers) const {
        const Stack &base = bases[s.base.stack], &delta = deltas[s.delta.stack];
        const TileOf of_base = tile(base, s.base.index, 1, o);
        if (!bytes) unpack_tile(base.kind, of_base, in, bytes = room);
        float* scales = aligned(buffers.scales, (in + base.group - 1) / base.group * LANES);
        uint8_t* summed = aligned(buffers.summed, (in + UNIT) * LANES);
        sum_bytes(delta.kind, bytes, of_base, tile(delta, s.delta.index, s.sign, o), in, summed, scales);
        const Rounded rows = x.rounded.from(s.first);
        for (int64_t start = 0, g = 0; start < in; start += base.group, ++g)
            group_rows<false>(summed + start * LANES, std::min(base.group, in - start), rows, start, g, s.last - s.first,
                              _mm512_loadu_ps(scales + g * LANES), sums, PIECE);
    }

    // Outputs o .. o + 16 (paired) or o .. o + 32 of the segments of one base. index: of the first segment.
    void run(const Rows* segments, int64_t count, int64_t index, int64_t o, const Problem& p, const Scratch& scratch,
             Buffers& buffers) const {
        const int64_t first = segments[0].first, rows = segments[count - 1].last - first;
        float* sums = aligned(buffers.sums, rows * PIECE);
        bool few = false;
        for (int64_t s = 0; s < count; ++s) {
            if (segments[s].way == Way::PAIRS) continue;
            float* its = sums + (segments[s].first - first) * PIECE;
            memset(its, 0, (segments[s].last - segments[s].first) * PIECE * sizeof(float));
            few |= segments[s].way == Way::APART;
        }
        for (int64_t half = 0; few && half < 2; ++half) add_few(segments, count, half_at(half, o), sums + half * LANES, buffers);
        uint8_t* bytes[2] = {nullptr, nullptr};
        for (int64_t s = 0; s < count; ++s) {
            const Rows& its = segments[s];
            uint8_t* room = its.way == Way::APART ? nullptr : aligned(buffers.bytes, in * PIECE);
            if (its.way == Way::PAIRS) {
                uint32_t* pairs = aligned(buffers.packed, in / 2 * PIECE);
                for (int64_t half = 0; half < 2; ++half)
                    make_pairs(its, half_at(half, o), bytes[half], room + half * in * LANES, pairs + half * LANES, buffers);
                matmul_group(p, scratch, index + s, pairs, nullptr, o, paired ? LANES : PIECE);
                continue;
            }
            for (int64_t half = 0; its.way == Way::BYTES && half < 2; ++half)
                add_summed(its, half_at(half, o), bytes[half], room + half * in * LANES,
                           sums + (its.first - first) * PIECE + half * LANES, buffers);
            for (int64_t r = its.first; r < its.last; ++r) {
                const __m512 one = _mm512_load_ps(sums + (r - first) * PIECE), two = _mm512_load_ps(sums + (r - first) * PIECE + LANES);
                uint16_t* to = y + r * out + o;
                store_bf16(to, paired ? gated(round_bf16(one), round_bf16(two)) : one);
                if (!paired) store_bf16(to + LANES, two);
            }
        }
    }

private:
    int64_t half_at(int64_t half, int64_t o) const { return o + half * (paired ? out : LANES); }

    // sums += outputs o .. o + 16 of the segments whose base and delta stay apart.
    void add_few(const Rows* segments, int64_t count, int64_t o, float* sums, Buffers& buffers) const {
        const int64_t first = segments[0].first;
        const auto alone = [this](const Rows& s) { return is_exact(s) || s.way != Way::APART; };
        for (int64_t s = 0; s < count;) {  // the base, for all neighbours that need it
            int64_t end = s;
            while (end < count && !alone(segments[end])) ++end;
            if (end > s)
                add(bases[segments[s].base.stack], segments[s].base.index, 1, o, segments[s].first, segments[end - 1].last,
                    false, sums + (segments[s].first - first) * PIECE, buffers);
            s = std::max(end, s + 1);
        }
        for (int64_t s = 0; s < count; ++s) {
            const Rows& own = segments[s];
            float* its = sums + (own.first - first) * PIECE;
            if (own.delta.stack < 0 || own.way != Way::APART) continue;
            if (is_exact(own)) add_values(exact_rows(own, o, buffers), own.first, own.last, its, buffers);
            else add(deltas[own.delta.stack], own.delta.index, own.sign, o, own.first, own.last, coarse_deltas, its, buffers);
        }
    }
};

inline void run_product(const Product& product, const std::vector<Rows>& segments, const std::vector<int64_t>& groups,
                 const std::vector<int64_t>& starts, Scratch& scratch, int num_threads) {
    const Problem p = product.problem(starts);
    make_tiles(p, scratch, [&](int64_t g) { return segments[g].way == Way::PAIRS; });
    pack_tiles(p, scratch, num_threads);
    const int64_t step = p.outputs_a_piece(), pieces = product.out / step;
    const int64_t total = (static_cast<int64_t>(groups.size()) - 1) * pieces;
    const int64_t chunk = std::clamp<int64_t>(total / (16 * num_threads), 1, 16);
    parallel_for(total, chunk, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local Buffers buffers;
        const amx::Tiles tiles;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces;
            product.run(segments.data() + groups[g], groups[g + 1] - groups[g], groups[g], piece % pieces * step, p, scratch, buffers);
        }
    });
}

}  // namespace polymoe
