// The routed experts of one layer where bases are packed or variants have deltas, in bfloat16, gated by SiLU, without
// biases. See compressed_experts.py for the equation and the torch fallback, tiles.h for packed matrices.
//
// Rows are sorted by base, then delta; tiled_product.h multiplies.

#include "rounded_rows.h"
#include "tiled_product.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

namespace polymoe {
namespace {

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
            segments.push_back({{find(gate_up_bases, its.base), find(gate_up_deltas, its.delta / 2 - 1), its.delta % 2 ? -1.0f : 1.0f}, i, i, Way::APART});
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
    const auto choose = [&](int64_t bits) {
        alone.assign(here, false);
        for (Rows& s : segments) {
            s.way = way_of(s, s.last - s.first, bits, gate_up_bases, gate_up_deltas);
            std::fill(alone.begin() + s.first, alone.begin() + s.last, s.way == Way::PAIRS);
        }
    };
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
    choose(up_bits);
    const Inputs up{sorted.data(), round_rows(sorted.data(), width, up_bits)};
    run_product({width, inner, true, gate_up_bases, gate_up_deltas, up, Tail(width), active.data(), coarse}, segments,
                groups, starts, scratch, num_threads);
    choose(down_bits);
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
