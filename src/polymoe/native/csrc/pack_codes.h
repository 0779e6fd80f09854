// Codes of a row -> the bytes that bundles hold, as polymoe/quant/formats.py has them.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace polymoe {

// One block: byte j of `count` has value j in its low bits, value j + count above, and so on.
template <int WIDTH>
inline void pack_block(const uint8_t* codes, int64_t count, int64_t shift, uint8_t* out) {
    for (int64_t j = 0; j < count; ++j) {
        uint8_t byte = 0;
        for (int k = 0; k < 8 / WIDTH; ++k)
            byte |= static_cast<uint8_t>(((codes[k * count + j] >> shift) & ((1 << WIDTH) - 1)) << (k * WIDTH));
        out[j] = byte;
    }
}

// One plane of a row; returns its bytes. Behind the last code there are zeros.
template <int WIDTH>
int64_t pack_plane(const uint8_t* codes, int64_t inputs, int64_t shift, uint8_t* out) {
    const int64_t bytes = (inputs * WIDTH + 7) / 8, whole = inputs / (32 * 8 / WIDTH) * 32;
    for (int64_t start = 0; start < whole; start += 32) pack_block<WIDTH>(codes + start * 8 / WIDTH, 32, shift, out + start);
    if (whole < bytes) pack_block<WIDTH>(codes + whole * 8 / WIDTH, bytes - whole, shift, out + whole);
    return bytes;
}

// codes [inputs], each below 2^bits -> the bytes of a row, plane after plane.
inline void pack(const uint8_t* codes, int64_t inputs, int64_t bits, uint8_t* out) {
    switch (bits) {
        case 1: pack_plane<1>(codes, inputs, 0, out); break;
        case 2: pack_plane<2>(codes, inputs, 0, out); break;
        case 3: out += pack_plane<2>(codes, inputs, 0, out); pack_plane<1>(codes, inputs, 2, out); break;
        case 4: pack_plane<4>(codes, inputs, 0, out); break;
        case 5: out += pack_plane<4>(codes, inputs, 0, out); pack_plane<1>(codes, inputs, 4, out); break;
        case 6: out += pack_plane<4>(codes, inputs, 0, out); pack_plane<2>(codes, inputs, 4, out); break;
        case 8: std::copy(codes, codes + inputs, out); break;
    }
}

}  // namespace polymoe
