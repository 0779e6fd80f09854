// Weights into scaled codes: for each group of a row the scale, the nearest level of each value, and the packed codes.
//
//     s_0 = sqrt(Σ w² / n),   s = Σ w l(w / s_0) / Σ l(w / s_0)²  rounded to bfloat16,   code = nearest level of w / s
//
// Scales of 8 bits are the largest value over 127, those of 1 bit the mean over the level. Layout and levels are those of
// polymoe/quant/formats.py.

#include "../pack_codes.h"
#include "../threads.h"
#include "vectors.h"

namespace polymoe {
namespace {

struct Nearest {
    const float* values;    // [2^bits]
    const int32_t* search;  // code of the level nearest to each 1 / resolution step of [-limit, limit]
    float limit, resolution;
    int64_t bits;

    // Codes of `count` values over `scale`; of values over a scale of 0 those of 0.
    void codes(const float* w, int64_t count, float scale, uint8_t* to) const {
        for (int64_t i = 0; i < count; ++i) {
            const float ratio = w[i] / scale, size = ratio < 0 ? -ratio : ratio, r = size <= __FLT_MAX__ ? ratio : 0;
            if (bits == 8) {
                const float magic = 12582912.0f, whole = (r + magic) - magic;
                to[i] = static_cast<uint8_t>(static_cast<int>(whole > 127 ? 127 : whole < -127 ? -127 : whole) + 128);
            } else if (bits == 1) {
                to[i] = r > 0;
            } else {
                const float held = r > limit ? limit : r < -limit ? -limit : r;
                to[i] = static_cast<uint8_t>(search[static_cast<int32_t>((held + limit) * resolution)]);
            }
        }
    }

    // The scale of `count` values; a group has room for `size`, what is missing counts as zeros.
    float scale(const float* w, int64_t count, int64_t size) const {
        float most = 0, total[16] = {}, squares[16] = {};
        for (int64_t i = 0; i < count; ++i) {
            const float absolute = w[i] < 0 ? -w[i] : w[i];
            most = absolute > most ? absolute : most;
            total[i % 16] += absolute;
            squares[i % 16] += w[i] * w[i];
        }
        if (bits == 8) return most / 127;
        for (int i = 1; i < 16; ++i) total[0] += total[i], squares[0] += squares[i];
        if (bits == 1) return total[0] / static_cast<float>(count) / values[1];
        const float first = __builtin_sqrtf(squares[0] / static_cast<float>(count));
        uint8_t found[256], of_zero;
        const float zero = 0;
        codes(&zero, 1, 1, &of_zero);
        float above[16] = {}, below[16] = {};
        for (int64_t start = 0; start < count; start += 256) {
            const int64_t here = std::min<int64_t>(256, count - start);
            codes(w + start, here, first, found);
            for (int64_t i = 0; i < here; ++i) {
                const float level = values[found[i]];
                above[i % 16] += w[start + i] * level;
                below[i % 16] += level * level;
            }
        }
        below[0] += static_cast<float>((size + 15) / 16 * 16 - count) * values[of_zero] * values[of_zero];  // zeros have a level too
        for (int i = 1; i < 16; ++i) above[0] += above[i], below[0] += below[i];
        return below[0] > 0 ? above[0] / below[0] : 0;
    }
};

}  // namespace
}  // namespace polymoe

// weight [outputs, inputs] float32 -> packed [outputs, row_bytes] and scales [outputs, groups] bfloat16.
extern "C" void polymoe_encode_f32(const float* weight, int64_t outputs, int64_t inputs, int64_t size, int64_t bits,
                                   const float* values, const int32_t* search, float limit, float resolution,
                                   uint8_t* packed, int64_t row_bytes, uint16_t* scales, int num_threads) {
    using namespace polymoe;
    const Nearest nearest{values, search, limit, resolution, bits};
    const int64_t groups = (inputs + size - 1) / size;
    parallel_for(outputs, 16, num_threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(inputs + 64);  // the last block may be short
        for (int64_t o = begin; o < end; ++o) {
            for (int64_t g = 0; g < groups; ++g) {
                const float* w = weight + o * inputs + g * size;
                const int64_t count = std::min(size, inputs - g * size);
                const uint16_t rounded = to_bf16(nearest.scale(w, count, size));
                scales[o * groups + g] = rounded;
                nearest.codes(w, count, from_bf16(rounded), codes.data() + g * size);
            }
            pack(codes.data(), inputs, bits, packed + o * row_bytes);
        }
    });
}
