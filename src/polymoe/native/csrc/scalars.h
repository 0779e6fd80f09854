// bfloat16 values one at a time, for what compilers make vectors of.
#pragma once

#include <stdint.h>
#include <string.h>

namespace polymoe {

inline float bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// To nearest even, as torch rounds.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float rounded_bf16(float value) { return bf16_value(to_bf16(value)); }

}  // namespace polymoe
