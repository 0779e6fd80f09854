// Which values of a matrix differ from a base's, bit for bit: the lossless delta of polymoe/quant/exact.py.

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Bit j: value j of 32 differs. `count` of them are there.
#ifdef __AVX512BW__
uint32_t differing(const uint16_t* a, const uint16_t* b, int64_t count) {
    const __mmask32 there = count < 32 ? (1u << count) - 1 : ~0u;
    return _mm512_cmpneq_epi16_mask(_mm512_maskz_loadu_epi16(there, a), _mm512_maskz_loadu_epi16(there, b));
}

uint32_t differing(const uint32_t* a, const uint32_t* b, int64_t count) {
    const uint32_t there = count < 32 ? (1u << count) - 1 : ~0u;
    const __mmask16 low = there & 0xffff, high = there >> 16;
    const uint32_t first = _mm512_cmpneq_epi32_mask(_mm512_maskz_loadu_epi32(low, a), _mm512_maskz_loadu_epi32(low, b));
    const uint32_t second =
        _mm512_cmpneq_epi32_mask(_mm512_maskz_loadu_epi32(high, a + 16), _mm512_maskz_loadu_epi32(high, b + 16));
    return first | second << 16;
}
#else
template <class Value>
uint32_t differing(const Value* a, const Value* b, int64_t count) {
    uint32_t mask = 0;
    for (int64_t j = 0; j < count; ++j) mask |= uint32_t(a[j] != b[j]) << j;
    return mask;
}
#endif

template <class Value>
int64_t changes(const Value* weight, const Value* base, int64_t rows, int64_t in, uint8_t* bitmap, Value* values) {
    const Value* const begin = values;
    for (int64_t o = 0; o < rows; ++o, weight += in, base += in, bitmap += (in + 7) / 8)
        for (int64_t i = 0; i < in; i += 32) {
            const int64_t count = std::min<int64_t>(32, in - i);
            const uint32_t mask = differing(weight + i, base + i, count);
            memcpy(bitmap + i / 8, &mask, (count + 7) / 8);
            for (uint32_t left = mask; left; left &= left - 1) *values++ = weight[i + __builtin_ctz(left)];
        }
    return values - begin;
}

}  // namespace

// weight, base: [rows, in]. bitmap: [rows, ceil(in / 8)], value j of a byte's eight in bit j. values: those of `weight` that
// are not the base's, with room for rows * in. Returns how many they are.
extern "C" int64_t polymoe_changes_16(const uint16_t* weight, const uint16_t* base, int64_t rows, int64_t in,
                                      uint8_t* bitmap, uint16_t* values) {
    return changes(weight, base, rows, in, bitmap, values);
}

extern "C" int64_t polymoe_changes_32(const uint32_t* weight, const uint32_t* base, int64_t rows, int64_t in,
                                      uint8_t* bitmap, uint32_t* values) {
    return changes(weight, base, rows, in, bitmap, values);
}
