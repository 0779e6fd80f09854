// Rows of activations rounded to integers, in memory that is kept from call to call.
#pragma once

#include <vector>

#include "amx.h"
#include "tiles.h"

namespace polymoe {

// Activations in 8 or 16 bits, kept from call to call.
struct RoundedRows {
    std::vector<int8_t> high, low;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    Rounded make(int64_t rows, int64_t in, int64_t group, bool two) {
        const int64_t groups = (in + group - 1) / group, size = (rows + amx::ROWS) * in + amx::BYTES;  // AMX reads whole tiles
        if (static_cast<int64_t>(high.size()) < size) high.resize(size);
        if (two && static_cast<int64_t>(low.size()) < size) low.resize(size);
        if (static_cast<int64_t>(scales.size()) < rows * groups) scales.resize(rows * groups), sums.resize(rows * groups * 2);
        return {high.data(), two ? low.data() : nullptr, scales.data(), sums.data(), in, groups};
    }
};

inline void round_one(const Rounded& to, int64_t row, const uint16_t* values, int64_t group) {
    const Rounded at = to.from(row);
    round_row(values, to.in, group, const_cast<int8_t*>(at.high), const_cast<int8_t*>(at.low), const_cast<float*>(at.scales),
              const_cast<int32_t*>(at.sums));
}

}  // namespace polymoe
