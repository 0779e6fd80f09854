// Rows of x times the weights of their group, in bfloat16 with float32 sums: what grouped_linear.cpp and experts.cpp share.
//
// Weights lie as stored, [outputs, inputs] row-major. One piece of work is a group and WEIGHT_ROWS rows of its weight.
// With few rows of x (decode) the aim is to stream the weights at the memory's speed: `dots` walks a tile of rows and
// weights along the inputs and adds up lanes at the end. With more (prefill) arithmetic is the limit: the piece is
// repacked once so that 16 outputs lie side by side, and `matmul` keeps a tile of 12 rows by 32 outputs in registers, or
// with AMX 32 by 32 in its tiles.
#pragma once

#include "dots.h"
#include "matmul.h"

namespace polymoe {
inline namespace POLYMOE_INSTRUCTIONS {

inline void run(const Problem& p, Scratch& scratch, int num_threads) {
    const int64_t few = amx::few_rows();
    make_tiles(p, scratch, [&](int64_t g) { return p.rows(g) > few; });
    const int64_t num_tiles = static_cast<int64_t>(scratch.tiles.size());
    const int64_t step = p.outputs_a_piece(), pieces = (p.out + step - 1) / step;
    pack_tiles(p, scratch, num_threads);
    // A thread fetches weights ahead of itself, so it should have neighbouring pieces, but not too many of the last ones.
    const int64_t chunk = std::clamp<int64_t>(p.num_groups * pieces / (16 * num_threads), 2, 16);
    parallel_for(p.num_groups * pieces, chunk, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<uint32_t> buffer;
        const amx::Tiles tiles;
        uint32_t* packed = num_tiles ? aligned(buffer, p.in / 2 * WEIGHT_ROWS) : nullptr;
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece / pieces, o = piece % pieces * step, count = std::min(step, p.out - o);
            if (p.rows(g) > few) {
                const uint16_t* first = p.weights[g] + o * p.in;
                pack_piece(p, first, first + p.out * p.in, count, packed);
                const uint16_t* next = first + step * p.in;  // of the last piece what lies behind: no fault, where it is nothing
                matmul_group(p, scratch, g, packed, p.biases ? p.biases[g] + o : nullptr, o, count,
                             {next, p.paired ? next + p.out * p.in : next + 16 * p.in});
            } else if (p.paired) {
                dots<true>(p, g, o, count);
            } else {
                dots<false>(p, g, o, count);
            }
        }
    });
}

}  // inline namespace
}  // namespace polymoe
