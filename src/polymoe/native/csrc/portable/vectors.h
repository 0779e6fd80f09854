// The thin layer under the portable kernels: float32 vectors of the compiler, and bfloat16 in memory.
//
// Every source in this folder is compiled once for each instruction set (hatch_build.py), into a library of its own. What
// is not C++ with vectors is in this file and in dot_products.h. A vector has W lanes: 8 on x86-64 with AVX2, 4 on Arm.
#pragma once

#include <stdint.h>
#include <string.h>

#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "the portable kernels need AVX2 or NEON"
#endif

namespace polymoe {

#if defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

template <class Vector>
inline Vector load_as(const void* from) {
    Vector found;
    memcpy(&found, from, sizeof found);
    return found;
}

template <class Vector>
inline void store(void* to, Vector values) {
    memcpy(to, &values, sizeof values);
}

// W values as float32, of float32 or of bfloat16.
inline Floats load(const float* from) { return load_as<Floats>(from); }
inline Floats load(const uint16_t* from) {
#if defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (Floats)_mm256_slli_epi32(wide, 16);
#else
    return (Floats)((Words)vmovl_u16(vld1_u16(from)) << 16);
#endif
}

inline Floats all(float value) { return value - Floats{}; }

inline float sum_of(Floats v) {
    float lanes[W];
    store(lanes, v);
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline float from_bf16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// Rounded to nearest even, as torch does; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

inline float round_bf16(float value) { return from_bf16(to_bf16(value)); }

// e^x to about 1e-7 relative, for x <= 0; without branches, for loops that the compiler makes vectors of.
inline float exp_negative(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number
    const float n = (x * 1.44269504f + magic) - magic;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + (r + 1.0f);
    const uint32_t power = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

// silu(gate) * up of 16 outputs, rounded to bfloat16 where torch rounds.
inline void gated(const float* gate, const float* up, uint16_t* to) {
    for (int i = 0; i < 16; ++i) {
        const float g = round_bf16(gate[i]), e = exp_negative(g < 0 ? g : -g);
        const float sigmoid = (g < 0 ? e : 1.0f) / (1.0f + e);
        to[i] = to_bf16(round_bf16(g * sigmoid) * round_bf16(up[i]));
    }
}

// Of each thread: `size` elements that are kept, at a multiple of 64 bytes.
template <class T>
inline T* aligned(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size + 64) buffer.resize(size + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

}  // namespace polymoe
