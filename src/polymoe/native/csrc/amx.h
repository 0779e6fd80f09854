// AMX, the matrix unit of Intel's servers: eight tiles of 16 rows by 64 bytes, and products of them.
//
//     C [16][16] += A [16][32] · B     bfloat16, B in pairs of inputs [16][16][2]
//     C [16][16] += A [16][64] · B     A signed, B unsigned bytes, B in fours of inputs [16][16][4]
//
// Built with POLYMOE_EMULATE_AMX the same functions run anywhere, in plain C++: for tests on other processors.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef POLYMOE_EMULATE_AMX
#include <math.h>
#include <stdlib.h>
#endif

namespace polymoe::amx {

enum { BF16 = 1, INT8 = 2 };

// Which products run on AMX here, bits of the above: where the processor and the system have it, unless it turned out to
// be slower when it was tried (amx.cpp).
int chosen();

// Rows of x up to which `dots` of linear.h is faster than a product in tiles.
int64_t few_rows();

constexpr int64_t ROWS = 16, BYTES = 64;  // of a tile

struct alignas(64) Shape {  // as LDTILECFG reads it: all eight tiles are whole
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES};
    uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
};
static_assert(sizeof(Shape) == 64, "what LDTILECFG reads");

#ifndef POLYMOE_EMULATE_AMX

// By the assembler's names: the compiler's own functions would need flags for whole files, and take no template's number.
inline void configure() {
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline void release() { asm volatile("tilerelease" ::); }
template <int T>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// stride: bytes from one row to the next.
template <int T>
inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void add_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void add_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Emulated {
    bool configured = false;
    alignas(64) uint8_t tile[8][ROWS * BYTES];
};
inline Emulated& emulated() {
    static thread_local Emulated instance;
    return instance;
}
inline uint8_t* tile(int t) {
    if (!emulated().configured) abort();  // the instruction would raise a fault
    return emulated().tile[t];
}
inline void configure() { emulated().configured = true; }
inline void release() { emulated().configured = false; }
template <int T>
inline void zero() {
    memset(tile(T), 0, ROWS * BYTES);
}
template <int T>
inline void load(const void* from, int64_t stride) {
    for (int64_t r = 0; r < ROWS; ++r) memcpy(tile(T) + r * BYTES, static_cast<const uint8_t*>(from) + r * stride, BYTES);
}
template <int T>
inline void store(void* to, int64_t stride) {
    for (int64_t r = 0; r < ROWS; ++r) memcpy(static_cast<uint8_t*>(to) + r * stride, tile(T) + r * BYTES, BYTES);
}
template <int C, int A, int B>
inline void add_bf16() {
    float* c = reinterpret_cast<float*>(tile(C));
    const uint16_t *a = reinterpret_cast<const uint16_t*>(tile(A)), *b = reinterpret_cast<const uint16_t*>(tile(B));
    const auto value = [](uint16_t bits) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float result;
        memcpy(&result, &wide, 4);
        return result;
    };
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 2; ++i) c[16 * m + n] += value(a[32 * m + 2 * k + i]) * value(b[32 * k + 2 * n + i]);
}
template <int C, int A, int B>
inline void add_int8() {
    int32_t* c = reinterpret_cast<int32_t*>(tile(C));
    const int8_t* a = reinterpret_cast<const int8_t*>(tile(A));
    const uint8_t* b = tile(B);
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 4; ++i) c[16 * m + n] += a[64 * m + 4 * k + i] * b[64 * k + 4 * n + i];
}

#endif

// The calling thread's tiles, for as long as this lives; nothing where AMX is not used. Held only while computing: the
// system saves 8 KiB more of a thread that has them.
struct Tiles {
    const bool used = chosen() != 0;
    Tiles() { if (used) configure(); }
    ~Tiles() { if (used) release(); }
    Tiles(const Tiles&) = delete;
};

}  // namespace polymoe::amx
