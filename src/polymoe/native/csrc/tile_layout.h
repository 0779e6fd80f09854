// How a packed matrix lies in tiles of 16 outputs, for every instruction set's kernels.
//
// In memory a matrix is [tile][unit][bits][64 bytes]: a unit is 16 outputs by 32 inputs, eight vectors of 16 outputs by 4
// neighbouring inputs each (what VNNI multiplies at once, and a row of an AMX tile). Codes of a width of bits lie beside
// each other in a byte: 4 bits hold vectors 2 j and 2 j + 1, 2 bits four, 1 bit all eight; 3, 5 and 6 are two such planes.
// Scales are [tile][group][16].
#pragma once

#include <stdint.h>

namespace polymoe {

constexpr int64_t LANES = 16, UNIT = 32, VECTORS = 8;  // outputs of a tile; inputs and vectors of a unit
constexpr int64_t MOST_GROUP = 256;                    // inputs of a group at most
constexpr float LOW_STEPS = 254;                       // steps of the second 8 bits in one of the first

inline int64_t group_of(int64_t in) {  // values that share a scale, as polymoe/quant/formats.py has it
    const int64_t groups = (in + MOST_GROUP - 1) / MOST_GROUP;
    return ((in + groups - 1) / groups + 63) / 64 * 64;
}

}  // namespace polymoe
