// One product with packed matrices, in tiles: what is no expert, in bfloat16. See packed_rows.py for the equation.
//
// Rows come sorted: segments on one base are neighbours. tiled_product.h multiplies.

#include "rounded_rows.h"
#include "tiled_product.h"

namespace polymoe {
namespace {

// Memory that is kept from call to call.
struct Workspace {
    std::vector<int64_t> groups, starts;
    std::vector<Rows> segments;
    RoundedRows rows;
    Scratch scratch;
};

}  // namespace
}  // namespace polymoe

// x [rows, in], y [rows, out]; segment g has rows starts[g] .. starts[g + 1], base[g] and delta[g] (-1: none). in and out
// are multiples of 32. bits: of activations, 8 or 16; coarse: deltas are multiplied by the first 8 bits only.
extern "C" void polymoe_tiled_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_segments,
                                          const int64_t* starts, const int64_t* base, const int64_t* delta,
                                          const polymoe::Stack* bases, const polymoe::Stack* deltas, int64_t bits,
                                          int64_t coarse, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace kept;
    auto& [groups, begins, segments, rows, scratch] = kept;  // helpers see the caller's
    groups.clear();
    begins.clear();
    segments.clear();
    bool all_pairs = true;
    int64_t last_base = -1;
    for (int64_t g = 0; g < num_segments; ++g) {
        if (starts[g] == starts[g + 1]) continue;
        Rows one{{find(bases, base[g]), find(deltas, delta[g]), 1.0f}, starts[g], starts[g + 1], Way::APART};
        one.way = way_of(one, one.last - one.first, bits, bases, deltas);
        all_pairs &= one.way == Way::PAIRS;
        if (base[g] != last_base) groups.push_back(static_cast<int64_t>(segments.size()));
        last_base = base[g];
        segments.push_back(one);
        begins.push_back(one.first);
    }
    if (segments.empty()) return;
    groups.push_back(static_cast<int64_t>(segments.size()));
    const int64_t count = segments.back().last;
    begins.push_back(count);
    const Rounded rounded = rows.make(count, in, group_of(in), bits == 16);
    if (!all_pairs) parallel_for(count, 4, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) round_one(rounded, i, x + i * in, group_of(in));
    });
    const Inputs inputs{x, rounded};
    run_product({in, out, false, bases, deltas, inputs, Tail(in), y, coarse != 0}, segments, groups, begins, scratch, num_threads);
}
