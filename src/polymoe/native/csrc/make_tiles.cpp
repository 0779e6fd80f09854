// Packed matrices as bundles have them -> tiles; see tile_layout.h for both, tiles.py for when.

#include <string.h>

#include <algorithm>
#include <vector>

#include "threads.h"
#include "tile_layout.h"

// Codes in rows as polymoe/quant/formats.py packs them, [rows, row bytes], and scales [rows, groups] -> tiles. rows is a
// multiple of 16, in of 32.
extern "C" void polymoe_make_tiles(const uint8_t* codes, const uint16_t* scales, int64_t bits, int64_t rows, int64_t in,
                                   int64_t row_bytes, uint8_t* tiles, uint16_t* tile_scales, int num_threads) {
    using namespace polymoe;
    const int64_t groups = (in + group_of(in) - 1) / group_of(in);
    const int64_t wide = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits, narrow = bits - wide;
    const int64_t wide_bytes = (in * wide + 7) / 8;
    parallel_for(rows / LANES, 4, num_threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> plain(in);
        for (int64_t t = first; t < last; ++t) {
            uint8_t* tile = tiles + t * in * LANES * bits / 8;
            memset(tile, 0, in * LANES * bits / 8);
            for (int64_t o = 0; o < LANES; ++o) {
                const uint8_t* row = codes + (t * LANES + o) * row_bytes;
                memset(plain.data(), 0, in);
                const auto add_plane = [&](const uint8_t* plane, int64_t width, int64_t above) {
                    const int64_t unit = 256 / width;
                    for (int64_t start = 0; start < in; start += unit) {
                        const int64_t size = std::min(unit, in - start), bytes = size == unit ? 32 : (size * width + 7) / 8;
                        for (int64_t i = 0; i < size; ++i)
                            plain[start + i] |= (plane[start * width / 8 + i % bytes] >> i / bytes * width & ((1 << width) - 1)) << above;
                    }
                };
                add_plane(row, wide, 0);
                if (narrow) add_plane(row + wide_bytes, narrow, wide);
                for (int64_t k = 0; k < in; ++k) {
                    uint8_t* unit = tile + k / UNIT * 64 * bits;
                    const int64_t q = k % UNIT / 4, lane = o * 4 + k % 4;
                    unit[64 * (q * wide / 8) + lane] |= (plain[k] & ((1 << wide) - 1)) << q * wide % 8;
                    if (narrow) unit[64 * (wide + q * narrow / 8) + lane] |= plain[k] >> wide << q * narrow % 8;
                }
                for (int64_t g = 0; g < groups; ++g) tile_scales[(t * groups + g) * LANES + o] = scales[(t * LANES + o) * groups + g];
            }
        }
    });
}
