// Root-mean-square norm in bfloat16, each row with a weight of its own choice: y = w ∘ bf16(x / sqrt(mean(x²) + eps)),
// float32 inside, rounded where transformers' norms round. See rms_norm.py.

#include <algorithm>

#include "bf16.h"
#include "threads.h"

// x, y [rows, width]; weights [*, width]; row r uses row weight_of[r / repeat] of them, or row 0 when weight_of is null.
// width is a multiple of 16.
extern "C" void polymoe_rms_norm_bf16(const uint16_t* x, const uint16_t* weights, const int64_t* weight_of,
                                      int64_t repeat, int64_t rows, int64_t width, float eps, uint16_t* y,
                                      int num_threads) {
    const int64_t chunk = std::max<int64_t>(1, 8192 / width);
    polymoe::parallel_for(rows, chunk, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint16_t* in = x + r * width;
            const uint16_t* weight = weights + (weight_of ? weight_of[r / repeat] * width : 0);
            __m512 squares = _mm512_setzero_ps();
            for (int64_t d = 0; d < width; d += 16) {
                const __m512 value = load_bf16(in + d);
                squares = _mm512_fmadd_ps(value, value, squares);
            }
            const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
            const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps));
            for (int64_t d = 0; d < width; d += 16)
                store_bf16(y + r * width + d,
                           _mm512_mul_ps(load_bf16(weight + d), round_bf16(_mm512_mul_ps(load_bf16(in + d), scale))));
        }
    });
}
