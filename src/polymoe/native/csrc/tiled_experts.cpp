// The routed experts of one layer where bases are packed or variants have deltas, in bfloat16, gated by SiLU, without
// biases. See compressed_experts.py for the equation and the torch fallback, tiles.h for packed matrices.
//
// Rows are sorted by base, then delta. A segment has one base, one delta and one sign; a group is all segments of a base.
// A piece of work is a group and 16 outputs: the base's tile is decoded once for all rows of the group, whatever their
// variant, each delta's tile once for its own rows, and both are added up in float32 before the activation.
//
// What is no tile (stored weights, lossless deltas, formats with other levels) is made bfloat16, 16 rows at a time.

#include "linear.h"
#include "packed_codes.h"
#include "tiles.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

namespace polymoe {
namespace {

struct Rows : Segment {
    int64_t first, last;
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
    std::vector<uint32_t> pairs;
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

    // sums [rows, stride] += rows o .. o + 16 of the matrix times rows first .. last of x.
    void add(const Stack& stack, int64_t index, float sign, int64_t o, int64_t first, int64_t last, float* sums,
             int64_t stride, bool high_only, Buffers& buffers) const {
        if (stack.table) {
            const int64_t groups = (in + stack.group - 1) / stack.group, tile = (index * outputs() + o) / LANES;
            const int64_t bytes = in * LANES * stack.kind / 8;
            const TileOf of{stack.data + tile * bytes, stack.scales + tile * groups * LANES, stack.table, stack.step * sign, stack.group, bytes, groups * LANES};
            Rounded rows = x.rounded.from(first);
            if (high_only) rows.low = nullptr;
            return tile_rows(stack.kind, of, rows, last - first, sums, stride);
        }
        const uint16_t* rows = reinterpret_cast<const uint16_t*>(stack.data) + (index * outputs() + o) * in;
        if (stack.kind != STORED) {
            uint16_t* decoded = aligned(buffers.rows, LANES * in);
            decode_bf16(stack, tail, index, outputs(), in, o, LANES, sign, decoded);
            rows = decoded;
        }
        add_values(rows, first, last, sums, stride, buffers);
    }

    // The same for a lossless delta, base included.
    void add_exact(const Rows& s, int64_t o, float* sums, int64_t stride, Buffers& buffers) const {
        const Stack& base = bases[s.base.stack];
        uint16_t* own = aligned(buffers.rows, LANES * in);
        const uint16_t* under = reinterpret_cast<const uint16_t*>(base.data) + (s.base.index * outputs() + o) * in;
        replace_rows(deltas[s.delta.stack], s.delta.index, outputs(), in, o, LANES, under, own);
        add_values(own, s.first, s.last, sums, stride, buffers);
    }

    void add_values(const uint16_t* rows, int64_t first, int64_t last, float* sums, int64_t stride, Buffers& buffers) const {
        uint32_t* pairs = aligned(buffers.pairs, in / 2 * LANES);
        pack_weights(rows, in, LANES, pairs, LANES);
        const int64_t count = last - first, blocks = (count + 11) / 12, most = (count + blocks - 1) / blocks;
        for (int64_t r = 0; r < count; r += most) {
            const uint16_t* from = x.values + (first + r) * in;
            float* to = sums + r * stride;
            switch (std::min(most, count - r)) {
#define POLYMOE_ROWS(R) \
    case R: pair_rows<R>(pairs, from, in, to, stride); break;
                POLYMOE_ROWS(1) POLYMOE_ROWS(2) POLYMOE_ROWS(3) POLYMOE_ROWS(4) POLYMOE_ROWS(5) POLYMOE_ROWS(6)
                POLYMOE_ROWS(7) POLYMOE_ROWS(8) POLYMOE_ROWS(9) POLYMOE_ROWS(10) POLYMOE_ROWS(11) POLYMOE_ROWS(12)
#undef POLYMOE_ROWS
            }
        }
    }

    bool is_exact(const Segment& s) const { return s.delta.stack >= 0 && deltas[s.delta.stack].kind == EXACT; }

    // Outputs o .. o + 16 of the segments of one base.
    void run(const Rows* segments, int64_t count, int64_t o, Buffers& buffers) const {
        const int64_t first = segments[0].first, rows = segments[count - 1].last - first, stride = paired ? 2 * LANES : LANES;
        float* sums = aligned(buffers.sums, rows * stride);
        memset(sums, 0, rows * stride * sizeof(float));
        for (int half = 0; half < (paired ? 2 : 1); ++half) {
            const int64_t at = half * out + o;
            float* to = sums + half * LANES;
            for (int64_t s = 0; s < count;) {  // the base, for all neighbours that need it
                int64_t end = s;
                while (end < count && !is_exact(segments[end])) ++end;
                if (end > s)
                    add(bases[segments[s].base.stack], segments[s].base.index, 1, at, segments[s].first,
                        segments[end - 1].last, to + (segments[s].first - first) * stride, stride, false, buffers);
                s = std::max(end, s + 1);
            }
            for (int64_t s = 0; s < count; ++s) {
                const Rows& own = segments[s];
                float* its = to + (own.first - first) * stride;
                if (is_exact(own)) add_exact(own, at, its, stride, buffers);
                else if (own.delta.stack >= 0) add(deltas[own.delta.stack], own.delta.index, own.sign, at, own.first, own.last, its, stride, coarse_deltas, buffers);
            }
        }
        for (int64_t r = 0; r < rows; ++r, sums += stride) {
            const __m512 sum = _mm512_load_ps(sums);
            store_bf16(y + (first + r) * out + o, paired ? gated(round_bf16(sum), round_bf16(_mm512_load_ps(sums + LANES))) : sum);
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

void run_product(const Product& product, const std::vector<Rows>& segments, const std::vector<int64_t>& groups, int num_threads) {
    const int64_t pieces = product.out / LANES, total = (static_cast<int64_t>(groups.size()) - 1) * pieces;
    const int64_t chunk = std::clamp<int64_t>(total / (16 * num_threads), 1, 16);
    parallel_for(total, chunk, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local Buffers buffers;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces;
            product.run(segments.data() + groups[g], groups[g + 1] - groups[g], piece % pieces * LANES, buffers);
        }
    });
}

// Memory that is kept from call to call.
struct Workspace {
    std::vector<int64_t> groups, place;
    std::vector<Place> order;
    std::vector<Rows> segments;
    std::vector<uint16_t> sorted, active, out;
    RoundedRows token_rows, rows;
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
    auto& [groups, place, order, segments, sorted, active, out, token_rows, rows] = kept;  // helpers see the caller's
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
            segments.push_back({{find(gate_up_bases, its.base), find(gate_up_deltas, its.delta / 2 - 1), its.delta % 2 ? -1.0f : 1.0f}, i, i});
        segments.back().last = i + 1;
        place[its.pair] = i;
    }
    groups.push_back(static_cast<int64_t>(segments.size()));

    const auto grow = [](std::vector<uint16_t>& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    };
    grow(sorted, here * width), grow(active, here * inner), grow(out, pairs * width);
    const int64_t up_group = group_of(width), down_group = group_of(inner);
    // Tokens are rounded once; a row is a copy of its token's.
    const Rounded of_tokens = token_rows.make(up_bits ? tokens : 0, width, up_group, up_bits == 16);
    if (up_bits) parallel_for(tokens, 2, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) round_one(of_tokens, t, hidden + t * width, up_group);
    });
    const Rounded up = rows.make(up_bits ? here : 0, width, up_group, up_bits == 16);
    parallel_for(here, 8, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t token = order[i].pair / top_k;
            memcpy(sorted.data() + i * width, hidden + token * width, width * 2);
            if (!up_bits) continue;
            const Rounded from = of_tokens.from(token), to = up.from(i);
            memcpy(const_cast<int8_t*>(to.high), from.high, width);
            if (up_bits == 16) memcpy(const_cast<int8_t*>(to.low), from.low, width);
            memcpy(const_cast<float*>(to.scales), from.scales, up.groups * sizeof(float));
            memcpy(const_cast<int32_t*>(to.sums), from.sums, up.groups * 2 * sizeof(int32_t));
        }
    });
    run_product({width, inner, true, gate_up_bases, gate_up_deltas, {sorted.data(), up}, Tail(width), active.data(), coarse},
                segments, groups, num_threads);
    const Rounded down = rows.make(down_bits ? here : 0, inner, down_group, down_bits == 16);
    if (down_bits) parallel_for(here, 4, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) round_one(down, i, active.data() + i * inner, down_group);
    });
    run_product({inner, width, false, down_bases, down_deltas, {active.data(), down}, Tail(inner), out.data(), coarse},
                segments, groups, num_threads);
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
