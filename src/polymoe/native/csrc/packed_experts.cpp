// The routed experts of one layer where bases are packed or variants have deltas, in bfloat16: gated by SiLU and without
// biases in one call, any others one product a call. See compressed_experts.py for the equation and the torch fallback,
// packed_codes.h for the formats, packed_floats.cpp for other dtypes and sizes.
//
// Rows are sorted by base, then delta. A segment has one base, one delta and one sign; a group is all segments of a base.
// A piece of work is a group and WEIGHT_ROWS rows of its weight, of which no more than the piece is ever decoded:
//
//     few rows:   the base's rows are decoded once for all segments, each delta's once for its own;
//                 y = base · x + delta · x in the same sums, both rounded to bfloat16
//     more rows:  base + delta is summed in float32, rounded once, and multiplied as linear.h multiplies stored weights

#include "linear.h"
#include "packed_codes.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

namespace polymoe {
namespace {

constexpr int64_t APART_ROWS = 6;  // of a segment: up to here a delta has a product of its own
constexpr int64_t SUB_ROWS = 8;    // weight rows decoded at once for few rows: 2 x 8 x 1024 bfloat16 stay in L1

// All pools of one matrix.
struct Stacks {
    const Stack *bases, *deltas;
};

template <class T = uint16_t>
struct Rows {
    const T *first, *second;  // the halves, when paired; else all lie behind the first
};

// What one thread decodes into.
struct Buffers {
    std::vector<uint16_t> base, own;
    std::vector<float> floats;
    std::vector<uint32_t> packed;
};

// One product of all segments: rows of x times `count` weight outputs from `o` on.
struct Product {
    const Problem& p;
    const Stacks& stacks;
    const std::vector<Segment>& segments;
    const Tail& tail;

    int64_t outputs() const { return p.paired ? 2 * p.out : p.out; }

    template <class T, class F>  // f(first row of the matrix, rows, where they go)
    Rows<T> halves(int64_t o, int64_t count, T* to, F f) const {
        f(o, count, to);
        if (p.paired) f(p.out + o, count, to + count * p.in);
        return {to, to + count * p.in};
    }

    Rows<> base(const Segment& s, int64_t o, int64_t count, std::vector<uint16_t>& buffer) const {
        const Stack& stack = stacks.bases[s.base.stack];
        if (stack.kind == STORED) {
            const uint16_t* first = stored(s, o);
            return {first, first + p.out * p.in};
        }
        return halves(o, count, aligned(buffer, 2 * count * p.in), [&](int64_t row, int64_t rows, uint16_t* to) {
            decode_bf16(stack, tail, s.base.index, outputs(), p.in, row, rows, 1, to);
        });
    }

    Rows<> delta(const Segment& s, int64_t o, int64_t count, std::vector<uint16_t>& buffer) const {
        return halves(o, count, aligned(buffer, 2 * count * p.in), [&](int64_t row, int64_t rows, uint16_t* to) {
            decode_bf16(stacks.deltas[s.delta.stack], tail, s.delta.index, outputs(), p.in, row, rows, s.sign, to);
        });
    }

    // The base in float32, what `own` adds to: [count, in] of each half.
    const float* floats(const Segment& s, int64_t o, int64_t count, std::vector<float>& buffer) const {
        const Stack& stack = stacks.bases[s.base.stack];
        float* to = aligned(buffer, 2 * count * p.in);
        halves(o, count, to, [&](int64_t row, int64_t rows, float* to) {
            if (stack.kind != STORED) return decode_floats(stack, tail, s.base.index, outputs(), p.in, row, rows, to);
            const uint16_t* from = stored(s, row);
            for (int64_t k = 0; k < rows * p.in; k += 32) Floats::of_bf16(from + k).store(to + k);
        });
        return to;
    }

    // base + sign · delta, or what a lossless delta makes of the base.
    Rows<> own(const Segment& s, int64_t o, int64_t count, const float* base, std::vector<uint16_t>& buffer) const {
        const Stack& stack = stacks.deltas[s.delta.stack];
        return halves(o, count, aligned(buffer, 2 * count * p.in), [&](int64_t row, int64_t rows, uint16_t* to) {
            if (stack.kind == EXACT) return replace_rows(stack, s.delta.index, outputs(), p.in, row, rows, stored(s, row), to);
            const float* under = base + (row >= p.out && p.paired ? rows * p.in : 0);
            add_to_base(stack, tail, s.delta.index, outputs(), p.in, row, rows, s.sign, under, to);
        });
    }

    bool is_apart(int64_t g) const {
        return segments[g].delta.stack >= 0 && !is_exact(g) && p.rows(g) <= APART_ROWS;
    }

    bool is_exact(int64_t g) const {
        return segments[g].delta.stack >= 0 && stacks.deltas[segments[g].delta.stack].kind == EXACT;
    }

    bool has_own(int64_t g) const { return segments[g].delta.stack >= 0 && !is_apart(g); }

private:
    const uint16_t* stored(const Segment& s, int64_t row) const {
        const uint16_t* values = reinterpret_cast<const uint16_t*>(stacks.bases[s.base.stack].data);
        return values + (s.base.index * outputs() + row) * p.in;
    }
};

// MR rows of x against SUB_ROWS weight rows, and against as many of a delta where there is one.
template <int MR, bool PAIRED>
void dots_of(const Problem& p, const uint16_t* const* x, const Rows<>& base, const Rows<>* delta, const uint16_t* bias,
             uint16_t* y) {
    constexpr int NR = MR <= 2 ? 8 : MR <= 4 ? 4 : 2;
    for (int64_t i = 0; i < SUB_ROWS; i += NR) {
        const int64_t at = PAIRED ? i / 2 : i;
        const uint16_t *w[NR], *d[NR];
        for (int o = 0; o < NR; ++o) {
            const int64_t row = (at + (PAIRED ? o / 2 : o)) * p.in;
            w[o] = (PAIRED && o % 2 ? base.second : base.first) + row;
            if (delta) d[o] = (PAIRED && o % 2 ? delta->second : delta->first) + row;
        }
        __m512 sum[16];
        for (int j = 0; j < 16; ++j) sum[j] = _mm512_setzero_ps();
        add_products<MR, NR>(x, w, p.in, sum);
        if (delta) add_products<MR, NR>(x, d, p.in, sum);
        store_tile<MR, NR, PAIRED>(sum, bias ? bias + at : nullptr, y + at, p.out);
    }
}

template <bool PAIRED>
void dots_of_segment(const Problem& p, int64_t g, const Rows<>& base, const Rows<>* delta, int64_t o) {
    const uint16_t* bias = p.biases ? p.biases[g] + o : nullptr;
    for (int64_t r = p.starts[g]; r < p.starts[g + 1]; r += 8) {
        const int64_t rows = std::min<int64_t>(8, p.starts[g + 1] - r);
        const uint16_t* x[8];
        for (int64_t i = 0; i < rows; ++i) x[i] = p.row(r + i);
        uint16_t* y = p.y + r * p.out + o;
        switch (rows) {
            case 8: dots_of<8, PAIRED>(p, x, base, delta, bias, y); break;
            case 7: dots_of<7, PAIRED>(p, x, base, delta, bias, y); break;
            case 6: dots_of<6, PAIRED>(p, x, base, delta, bias, y); break;
            case 5: dots_of<5, PAIRED>(p, x, base, delta, bias, y); break;
            case 4: dots_of<4, PAIRED>(p, x, base, delta, bias, y); break;
            case 3: dots_of<3, PAIRED>(p, x, base, delta, bias, y); break;
            case 2: dots_of<2, PAIRED>(p, x, base, delta, bias, y); break;
            case 1: dots_of<1, PAIRED>(p, x, base, delta, bias, y); break;
        }
    }
}

// What a base gives to the segments on it, `count` weight rows from o on: each made once, when it is asked for.
struct Shared {
    const Product& product;
    const int64_t o, count;
    Buffers& buffers;
    Rows<> base{nullptr, nullptr};
    const float* floats = nullptr;

    // The rows that segment g is multiplied by, its delta in them unless that stays apart.
    Rows<> rows(int64_t g) {
        const Segment& segment = product.segments[g];
        if (product.has_own(g)) {
            if (!floats && !product.is_exact(g)) floats = product.floats(segment, o, count, buffers.floats);
            return product.own(segment, o, count, floats, buffers.own);
        }
        if (!base.first) base = product.base(segment, o, count, buffers.base);
        return base;
    }
};

// Outputs o .. o + count of segments first .. last, all on one base.
void run_piece(const Product& product, const Scratch& scratch, int64_t first, int64_t last, int64_t o, int64_t count,
               Buffers& buffers) {
    const Problem& p = product.p;
    const int64_t step = p.paired ? SUB_ROWS / 2 : SUB_ROWS, most_few = amx::few_rows();
    bool few = false;
    for (int64_t g = first; g < last; ++g) few |= p.rows(g) <= most_few;
    for (int64_t at = o; few && at < o + count; at += step) {
        Shared shared{product, at, step, buffers};
        for (int64_t g = first; g < last; ++g) {
            if (p.rows(g) > most_few) continue;
            const Rows<> rows = shared.rows(g);
            const bool apart = product.is_apart(g);
            const Rows<> delta = apart ? product.delta(product.segments[g], at, step, buffers.own) : rows;
            if (p.paired) dots_of_segment<true>(p, g, rows, apart ? &delta : nullptr, at);
            else dots_of_segment<false>(p, g, rows, apart ? &delta : nullptr, at);
        }
    }
    Shared shared{product, o, count, buffers};
    for (int64_t g = first; g < last; ++g) {
        if (p.rows(g) <= most_few) continue;
        const Rows<> rows = shared.rows(g);
        uint32_t* packed = aligned(buffers.packed, p.in / 2 * WEIGHT_ROWS);
        pack_piece(p, rows.first, rows.second, count, packed);
        matmul_group(p, scratch, g, packed, p.biases ? p.biases[g] + o : nullptr, o, count);
    }
}

void run_segments(const Product& product, const std::vector<int64_t>& groups, Scratch& scratch, int num_threads) {
    const Problem& p = product.p;
    make_tiles(p, scratch, [&](int64_t g) { return p.rows(g) > amx::few_rows(); });
    pack_tiles(p, scratch, num_threads);
    const int64_t num_groups = static_cast<int64_t>(groups.size()) - 1;
    const int64_t step = p.outputs_a_piece(), pieces = p.out / step;
    parallel_for(num_groups * pieces, 2, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local Buffers buffers;
        const amx::Tiles tiles;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces;
            run_piece(product, scratch, groups[g], groups[g + 1], piece % pieces * step, step, buffers);
        }
    });
}

}  // namespace
}  // namespace polymoe

// hidden [tokens, width]; base, delta and sign [tokens, top_k]: ids over all bases and all deltas, -1 is no delta, and
// null is none at all (of signs: all 1); gate [tokens, top_k]; pools of [2 * inner, width] (gate_up) and [width, inner]
// (down); y [tokens, width]. Where base < 0 the outputs are rows of `absent`, in the order of the pairs.
// width and inner are multiples of 32.
extern "C" void polymoe_packed_experts_bf16(const uint16_t* hidden, const int32_t* base, const int32_t* delta,
                                            const int8_t* sign, const float* gate, int64_t tokens, int64_t top_k,
                                            int64_t width, int64_t inner, const polymoe::Stack* gate_up_bases,
                                            const polymoe::Stack* gate_up_deltas, const polymoe::Stack* down_bases,
                                            const polymoe::Stack* down_deltas, const uint16_t* absent, uint16_t* y,
                                            int num_threads) {
    using namespace polymoe;
    static thread_local Scratch scratch;
    static thread_local std::vector<int64_t> starts, groups, row_of, place;
    static thread_local std::vector<Place> order;
    static thread_local std::vector<Segment> segments;
    static thread_local std::vector<uint16_t> active, out;
    const int64_t pairs = tokens * top_k;

    const int64_t num_absent = sort_pairs(base, delta, sign, pairs, order, place);
    const int64_t here = static_cast<int64_t>(order.size());
    segments.clear();
    starts.clear();
    groups.clear();
    row_of.resize(here);
    for (int64_t i = 0; i < here; ++i) {
        const Place& its = order[i];
        const bool other_base = i == 0 || order[i - 1].base != its.base;
        if (other_base) groups.push_back(static_cast<int64_t>(segments.size()));
        if (other_base || order[i - 1].delta != its.delta) {
            starts.push_back(i);
            segments.push_back({find(gate_up_bases, its.base), find(gate_up_deltas, its.delta / 2 - 1), its.delta % 2 ? -1.0f : 1.0f});
        }
        place[its.pair] = i;
        row_of[i] = its.pair / top_k;
    }
    starts.push_back(here);
    groups.push_back(static_cast<int64_t>(segments.size()));

    if (static_cast<int64_t>(active.size()) < here * inner) active.resize(here * inner);
    if (static_cast<int64_t>(out.size()) < pairs * width) out.resize(pairs * width);
    if (num_absent) {
        std::copy(absent, absent + num_absent * width, out.data() + here * width);
        for (int64_t i = 0; i < pairs; ++i)
            if (base[i] < 0) place[i] += here;
    }
    const int64_t count = static_cast<int64_t>(segments.size());
    const Problem up{hidden, row_of.data(), width, inner, count, starts.data(), nullptr, nullptr, true, active.data()};
    const Problem down{active.data(), nullptr, inner, width, count, starts.data(), nullptr, nullptr, false, out.data()};
    run_segments({up, {gate_up_bases, gate_up_deltas}, segments, Tail(width)}, groups, scratch, num_threads);
    run_segments({down, {down_bases, down_deltas}, segments, Tail(inner)}, groups, scratch, num_threads);
    polymoe_combine_bf16(out.data(), place.data(), gate, tokens, top_k, width, y, num_threads);
}

// y_r = W_g(r) x_r + b_g(r) for rows in order: x [rows, in], y [rows, out]; segment g has rows starts[g] .. starts[g + 1],
// base[g], delta[g] (-1: none) and sign[g]; neighbours on one base share it. bias [num_segments, out] or null.
// in and out are multiples of 32.
extern "C" void polymoe_packed_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_segments,
                                           const int64_t* starts, const int64_t* base, const int64_t* delta,
                                           const int64_t* sign, const polymoe::Stack* bases, const polymoe::Stack* deltas,
                                           const uint16_t* bias, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Scratch scratch;
    static thread_local std::vector<int64_t> groups;
    static thread_local std::vector<Segment> segments;
    static thread_local std::vector<const uint16_t*> biases;
    segments.clear();
    groups.clear();
    biases.clear();
    for (int64_t g = 0; g < num_segments; ++g) {
        if (g == 0 || base[g - 1] != base[g]) groups.push_back(g);
        segments.push_back({find(bases, base[g]), find(deltas, delta[g]), sign[g] < 0 ? -1.0f : 1.0f});
        if (bias) biases.push_back(bias + g * out);
    }
    groups.push_back(num_segments);
    const Problem p{x, nullptr, in, out, num_segments, starts, nullptr, bias ? biases.data() : nullptr, false, y};
    run_segments({p, {bases, deltas}, segments, Tail(in)}, groups, scratch, num_threads);
}
