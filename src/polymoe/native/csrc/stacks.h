// What Python tells of a layer's packed and stored experts, and rows in the order in which they meet them: no vectors here,
// so every instruction set's kernels read it.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace polymoe {

constexpr int64_t EXACT = 0, INT8 = 8, FP8 = 9, STORED = 16;  // kinds; 1 to 6 are the bits of formats with a table
constexpr int64_t BF16 = 0, FLOAT16 = 1, FLOAT32 = 2;         // types of values
constexpr int64_t MARK_ROWS = 16;

// One matrix of each expert of a pool; packed_stack.py fills it in. Rows are [outputs, inputs], expert after expert.
struct Stack {
    int64_t kind, count;     // experts
    const uint8_t* data;     // codes; the bitmaps of EXACT; the values of STORED
    const uint16_t* scales;  // [count, outputs, groups]
    int64_t row_bytes;       // of data
    int64_t group;           // values that share a scale, a multiple of 64
    const float* levels;     // [64], the format's over and over; [128] of FP8, without sign; none of INT8
    const uint16_t* values;  // EXACT: the changed values of all deltas,
    const int64_t* starts;   //   where each delta's begin,
    const int32_t* marks;    //   and how many of them precede rows 0, MARK_ROWS, 2 MARK_ROWS, … [count, marks]
    int64_t num_marks;
    int64_t type;  // of values, of EXACT and STORED
    const uint8_t* table;  // [64] levels + 128 where data and scales lie in tiles (tiles.h), else null
    float step;            // of a level there
};

// An expert: which pool and which of it.
struct Entry {
    int64_t stack, index;  // stack < 0: none
};

// The entry that has `id` when all pools are counted through; none for an id below 0.
inline Entry find(const Stack* stacks, int64_t id) {
    if (id < 0) return {-1, 0};
    int64_t stack = 0;
    for (; id >= stacks[stack].count; ++stack) id -= stacks[stack].count;
    return {stack, id};
}

// Rows of one base, one delta and one sign.
struct Segment {
    Entry base, delta;
    float sign;
};

// A (token, k) pair and where it belongs. `delta`: 0 for none, else 2 (id + 1), and 1 more if it is subtracted.
struct Place {
    int64_t base, delta, pair;

    bool operator<(const Place& other) const {
        return base != other.base ? base < other.base : delta != other.delta ? delta < other.delta : pair < other.pair;
    }
};

// The pairs that are here by base, then delta, into `order`; of an absent one (base < 0) its number among those into
// `place`, which has an entry for each pair afterwards. Returns how many are absent.
inline int64_t sort_pairs(const int32_t* base, const int32_t* delta, const int8_t* sign, int64_t pairs,
                          std::vector<Place>& order, std::vector<int64_t>& place) {
    place.resize(pairs);
    order.clear();
    int64_t num_absent = 0;
    for (int64_t i = 0; i < pairs; ++i) {
        if (base[i] < 0) place[i] = num_absent++;  // behind those that are here
        else if (!delta || delta[i] < 0) order.push_back({base[i], 0, i});
        else order.push_back({base[i], (delta[i] + int64_t{1}) * 2 + (sign && sign[i] < 0), i});
    }
    std::sort(order.begin(), order.end());
    return num_absent;
}

}  // namespace polymoe
