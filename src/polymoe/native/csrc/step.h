// What Python tells of a step, for kernels that compute whole layers of it: no vectors here, so every instruction set's
// kernels read it. See attention_layer.py.
#pragma once

#include <stdint.h>

extern "C" void polymoe_rms_norm_bf16(const uint16_t*, const uint16_t*, const int64_t*, int64_t, int64_t, int64_t, float,
                                      uint16_t*, int);

namespace polymoe {

// A step's rows by the version of a weight: group g is rows starts[g] .. starts[g + 1] and has version ids[g].
struct Grouping {
    int64_t count;
    const int64_t *ids, *starts;
    const int64_t* of_token;  // [tokens]: the version of each
};

struct Step {
    int64_t tokens;
    const Grouping* groupings;
    const int64_t *slots, *block_table;  // [tokens], [sequences, table_width]
    int64_t table_width;
    const int64_t *sequence, *visible, *variant;  // [tokens]
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
