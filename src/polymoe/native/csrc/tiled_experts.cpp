// The routed experts of one layer where bases are packed or variants have deltas, in bfloat16, gated by SiLU, without
// biases. See compressed_experts.py for the equation and the torch fallback, tiles.h for packed matrices.
//
// Rows are sorted by base, then delta. A segment has one base, one delta and one sign; a group is all segments of a base.
// A piece of work is a group and 16 outputs: the base's tile is decoded once for all rows of the group, whatever their
// variant, each delta's tile once for its own rows, and both are added up in float32 before the activation. A segment of
// many rows has its own weights made once, base and delta in one, in bfloat16, and a product as stored weights have it.
//
// What is no tile (stored weights, lossless deltas, formats with other levels) is made bfloat16, 16 rows at a time.

#include "linear.h"
#include "packed_codes.h"
#include "tile_pairs.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

namespace polymoe {
namespace {

struct Rows : Segment {
    int64_t first, last;
    bool many;  // its weights are made bfloat16, base and delta in one
};

// Rows of activations as the products read them.
struct Inputs {
    const uint16_t* values;  // [rows, in]
    Rounded rounded;
};

// What one thread works in.
struct Buffers {
    std::vector<float> sums;
    std::vector<uint16_t> rows;
    std::vector<uint32_t> pairs, packed;
    std::vector<uint8_t> bytes;
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
constexpr int64_t MANY_ROWS = 32;       // from here on a segment's weights are made bfloat16 (measured on Zen 4)

// Whether a segment of many rows has one matrix made of its base and delta: not of a packed base alone, which 8-bit
// products take half the time of.
bool is_one_matrix(const Segment& s, const Stack* bases, const Stack* deltas) {
    const Stack& base = bases[s.base.stack];
    if (s.delta.stack < 0) return base.kind == STORED;
    const Stack& delta = deltas[s.delta.stack];
    return delta.kind == EXACT || (base.table && delta.table && base.group == delta.group);
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

    // Outputs o .. o + 16 (paired) or o .. o + 32 of the segments of one base. index: of the first segment.
    void run(const Rows* segments, int64_t count, int64_t index, int64_t o, const Problem& p, const Scratch& scratch,
             Buffers& buffers) const {
        const int64_t first = segments[0].first, rows = segments[count - 1].last - first;
        float* sums = aligned(buffers.sums, rows * PIECE);
        bool few = false;
        for (int64_t s = 0; s < count; ++s) {
            if (segments[s].many) continue;
            float* its = sums + (segments[s].first - first) * PIECE;
            memset(its, 0, (segments[s].last - segments[s].first) * PIECE * sizeof(float));
            few = true;
        }
        for (int64_t half = 0; few && half < 2; ++half) add_few(segments, count, half_at(half, o), sums + half * LANES, buffers);
        uint8_t* bytes[2] = {nullptr, nullptr};
        for (int64_t s = 0; s < count; ++s) {
            const Rows& its = segments[s];
            if (its.many) {
                uint8_t* room = aligned(buffers.bytes, in * PIECE);
                uint32_t* pairs = aligned(buffers.packed, in / 2 * PIECE);
                for (int64_t half = 0; half < 2; ++half)
                    make_pairs(its, half_at(half, o), bytes[half], room + half * in * LANES, pairs + half * LANES, buffers);
                matmul_group(p, scratch, index + s, pairs, nullptr, o, paired ? LANES : PIECE);
                continue;
            }
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

    // sums += outputs o .. o + 16 of the segments without many rows.
    void add_few(const Rows* segments, int64_t count, int64_t o, float* sums, Buffers& buffers) const {
        const int64_t first = segments[0].first;
        const auto alone = [this](const Rows& s) { return is_exact(s) || s.many; };
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
            if (own.delta.stack < 0 || own.many) continue;
            if (is_exact(own)) add_values(exact_rows(own, o, buffers), own.first, own.last, its, buffers);
            else add(deltas[own.delta.stack], own.delta.index, own.sign, o, own.first, own.last, coarse_deltas, its, buffers);
        }
    }
};

// Activations in 8 or 16 bits, kept from call to call.
struct RoundedRows {
    std::vector<int8_t> high, low;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    Rounded make(int64_t rows, int64_t in, int64_t group, bool two) {
        const int64_t groups = (in + group - 1) / group;
        if (static_cast<int64_t>(high.size()) < rows * in) high.resize(rows * in);
        if (two && static_cast<int64_t>(low.size()) < rows * in) low.resize(rows * in);
        if (static_cast<int64_t>(scales.size()) < rows * groups) scales.resize(rows * groups), sums.resize(rows * groups * 2);
        return {high.data(), two ? low.data() : nullptr, scales.data(), sums.data(), in, groups};
    }
};

inline void round_one(const Rounded& to, int64_t row, const uint16_t* values, int64_t group) {
    const Rounded at = to.from(row);
    round_row(values, to.in, group, const_cast<int8_t*>(at.high), const_cast<int8_t*>(at.low), const_cast<float*>(at.scales),
              const_cast<int32_t*>(at.sums));
}

void run_product(const Product& product, const std::vector<Rows>& segments, const std::vector<int64_t>& groups,
                 const std::vector<int64_t>& starts, Scratch& scratch, int num_threads) {
    const Problem p = product.problem(starts);
    make_tiles(p, scratch, MANY_ROWS - 1);
    pack_tiles(p, scratch, num_threads);
    const int64_t step = p.outputs_a_piece(), pieces = product.out / step;
    const int64_t total = (static_cast<int64_t>(groups.size()) - 1) * pieces;
    const int64_t chunk = std::clamp<int64_t>(total / (16 * num_threads), 1, 16);
    parallel_for(total, chunk, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local Buffers buffers;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces;
            product.run(segments.data() + groups[g], groups[g + 1] - groups[g], groups[g], piece % pieces * step, p, scratch, buffers);
        }
    });
}

// Memory that is kept from call to call.
struct Workspace {
    std::vector<int64_t> groups, starts, place;
    std::vector<Place> order;
    std::vector<Rows> segments;
    std::vector<uint16_t> sorted, active, out;
    std::vector<char> alone;
    RoundedRows rows;
    Scratch scratch;
};

int64_t group_of(int64_t in) {  // values that share a scale, as polymoe/quant/formats.py has it
    const int64_t groups = (in + MOST_GROUP - 1) / MOST_GROUP;
    return ((in + groups - 1) / groups + 63) / 64 * 64;
}

}  // namespace
}  // namespace polymoe

// hidden [tokens, width]; base, delta and sign [tokens, top_k]: ids over all bases and all deltas, -1 is no delta, and
// null is none at all (of signs: all 1); gate [tokens, top_k]; pools of [2 * inner, width] (gate_up) and [width, inner]
// (down); y [tokens, width]. Where base < 0 the outputs are rows of `absent`, in the order of the pairs.
// width and inner are multiples of 32. up_bits, down_bits: of activations, 8 or 16; 0 where no matrix is in tiles.
extern "C" void polymoe_tiled_experts_bf16(const uint16_t* hidden, const int32_t* base, const int32_t* delta,
                                           const int8_t* sign, const float* gate, int64_t tokens, int64_t top_k,
                                           int64_t width, int64_t inner, const polymoe::Stack* gate_up_bases,
                                           const polymoe::Stack* gate_up_deltas, const polymoe::Stack* down_bases,
                                           const polymoe::Stack* down_deltas, int64_t up_bits, int64_t down_bits,
                                           const uint16_t* absent, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace kept;
    auto& [groups, starts, place, order, segments, sorted, active, out, alone, rows, scratch] = kept;  // helpers see the caller's
    const int64_t pairs = tokens * top_k;
    const bool coarse = std::min(up_bits, down_bits) == 8;

    const int64_t num_absent = sort_pairs(base, delta, sign, pairs, order, place);
    const int64_t here = static_cast<int64_t>(order.size());
    segments.clear();
    groups.clear();
    for (int64_t i = 0; i < here; ++i) {
        const Place& its = order[i];
        const bool other_base = i == 0 || order[i - 1].base != its.base;
        if (other_base) groups.push_back(static_cast<int64_t>(segments.size()));
        if (other_base || order[i - 1].delta != its.delta)
            segments.push_back({{find(gate_up_bases, its.base), find(gate_up_deltas, its.delta / 2 - 1), its.delta % 2 ? -1.0f : 1.0f}, i, i, false});
        segments.back().last = i + 1;
        place[its.pair] = i;
    }
    groups.push_back(static_cast<int64_t>(segments.size()));
    starts.clear();
    for (const Rows& s : segments) starts.push_back(s.first);
    starts.push_back(here);

    const auto grow = [](std::vector<uint16_t>& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    };
    grow(sorted, here * width), grow(active, here * inner), grow(out, pairs * width);
    alone.assign(here, false);
    for (Rows& s : segments) {
        s.many = s.last - s.first >= MANY_ROWS && is_one_matrix(s, gate_up_bases, gate_up_deltas);
        std::fill(alone.begin() + s.first, alone.begin() + s.last, s.many);
    }
    const auto round_rows = [&](const uint16_t* values, int64_t in, int64_t bits) {  // of those multiplied by codes
        const Rounded to = rows.make(bits ? here : 0, in, group_of(in), bits == 16);
        if (bits) parallel_for(here, 4, num_threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                if (!alone[i]) round_one(to, i, values + i * in, group_of(in));
        });
        return to;
    };
    parallel_for(here, 16, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            memcpy(sorted.data() + i * width, hidden + order[i].pair / top_k * width, width * 2);
    });
    const Inputs up{sorted.data(), round_rows(sorted.data(), width, up_bits)};
    run_product({width, inner, true, gate_up_bases, gate_up_deltas, up, Tail(width), active.data(), coarse}, segments,
                groups, starts, scratch, num_threads);
    const Inputs down{active.data(), round_rows(active.data(), inner, down_bits)};
    run_product({inner, width, false, down_bases, down_deltas, down, Tail(inner), out.data(), coarse}, segments, groups,
                starts, scratch, num_threads);
    if (num_absent) {
        std::copy(absent, absent + num_absent * width, out.data() + here * width);
        for (int64_t i = 0; i < pairs; ++i)
            if (base[i] < 0) place[i] += here;
    }
    polymoe_combine_bf16(out.data(), place.data(), gate, tokens, top_k, width, y, num_threads);
}

// Codes in rows as polymoe/quant/formats.py packs them, [rows, row bytes], and scales [rows, groups] -> tiles. rows is a
// multiple of 16, in of 32.
extern "C" void polymoe_make_tiles(const uint8_t* codes, const uint16_t* scales, int64_t bits, int64_t rows, int64_t in,
                                   int64_t row_bytes, uint8_t* tiles, uint16_t* tile_scales, int num_threads) {
    using namespace polymoe;
    const int64_t groups = (in + group_of(in) - 1) / group_of(in);
    const int64_t wide = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits, narrow = bits - wide;
    const int64_t wide_bytes = (in * wide + 7) / 8;
    parallel_for(rows / LANES, 4, num_threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> plain(in);
        for (int64_t t = first; t < last; ++t) {
            uint8_t* tile = tiles + t * in * LANES * bits / 8;
            memset(tile, 0, in * LANES * bits / 8);
            for (int64_t o = 0; o < LANES; ++o) {
                const uint8_t* row = codes + (t * LANES + o) * row_bytes;
                memset(plain.data(), 0, in);
                const auto add_plane = [&](const uint8_t* plane, int64_t width, int64_t above) {
                    const int64_t unit = 256 / width;
                    for (int64_t start = 0; start < in; start += unit) {
                        const int64_t size = std::min(unit, in - start), bytes = size == unit ? 32 : (size * width + 7) / 8;
                        for (int64_t i = 0; i < size; ++i)
                            plain[start + i] |= (plane[start * width / 8 + i % bytes] >> i / bytes * width & ((1 << width) - 1)) << above;
                    }
                };
                add_plane(row, wide, 0);
                if (narrow) add_plane(row + wide_bytes, narrow, wide);
                for (int64_t k = 0; k < in; ++k) {
                    uint8_t* unit = tile + k / UNIT * 64 * bits;
                    const int64_t q = k % UNIT / 4, lane = o * 4 + k % 4;
                    unit[64 * (q * wide / 8) + lane] |= (plain[k] & ((1 << wide) - 1)) << q * wide % 8;
                    if (narrow) unit[64 * (wide + q * narrow / 8) + lane] |= plain[k] >> wide << q * narrow % 8;
                }
                for (int64_t g = 0; g < groups; ++g) tile_scales[(t * groups + g) * LANES + o] = scales[(t * LANES + o) * groups + g];
            }
        }
    });
}
