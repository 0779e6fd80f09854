// What Python tells of a step, for kernels that compute whole layers of it: no vectors here, so every instruction set's
// kernels read it. See attention_layer.py.
#pragma once

#include <stdint.h>

#include <vector>

#include "stacks.h"

extern "C" {
void polymoe_grouped_linear_bf16(const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const uint16_t*,
                                 const uint16_t*, uint16_t*, int);
void polymoe_tiled_linear_bf16(const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*,
                               const polymoe::Stack*, const polymoe::Stack*, int64_t, int64_t, uint16_t*, int);
void polymoe_rms_norm_bf16(const uint16_t*, const uint16_t*, const int64_t*, int64_t, int64_t, int64_t, float, uint16_t*, int);
}

namespace polymoe {

// A step's rows by the version of a weight: group g is rows starts[g] .. starts[g + 1] and has version ids[g].
struct Grouping {
    int64_t count;
    const int64_t *ids, *starts;
    const int64_t* of_token;  // [tokens]: the version of each
};

struct Step {
    int64_t tokens;
    const Grouping *groupings, *sampled;  // of the tokens, and of those whose logits are wanted
    const int64_t *slots, *block_table;  // [tokens], [sequences, table_width]
    int64_t table_width;
    const int64_t *sequence, *visible, *variant;  // [tokens]
};

// A linear map. rows: null where it is packed, in tiles.
struct Projection {
    const uint16_t *rows, *bias;  // [versions, out, in], [versions, out] or null
    int64_t in, out, grouping;    // grouping: which of the step's
    const Stack *bases, *deltas;
    const int64_t *base_of, *delta_of;  // [versions]: what each is made of; -1: no delta
    int64_t bits, coarse;

    void run(const uint16_t* x, const Grouping* groupings, uint16_t* y, int threads) const {
        const Grouping& g = groupings[grouping];
        if (rows) return polymoe_grouped_linear_bf16(x, in, out, g.count, g.ids, g.starts, rows, bias, y, threads);
        std::vector<int64_t> made_of(2 * g.count);
        for (int64_t i = 0; i < g.count; ++i) {
            made_of[i] = base_of[g.ids[i]];
            made_of[g.count + i] = delta_of[g.ids[i]];
        }
        polymoe_tiled_linear_bf16(x, in, out, g.count, g.starts, made_of.data(), made_of.data() + g.count, bases, deltas, bits,
                                  coarse, y, threads);
    }
};

struct Norm {
    const uint16_t* weights;  // [versions, dim]; null: there is none
    int64_t grouping;         // which of the step's
    float eps;

    // x, y [rows, dim], `repeat` rows of each token; y may be x.
    void run(const uint16_t* x, const Grouping* groupings, int64_t repeat, int64_t rows, int64_t dim, uint16_t* y,
             int threads) const {
        polymoe_rms_norm_bf16(x, weights, groupings[grouping].of_token, repeat, rows, dim, eps, y, threads);
    }
};

}  // namespace polymoe
