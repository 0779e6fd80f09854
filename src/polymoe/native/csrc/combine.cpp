// The weighted sum of a token's expert outputs: y_t = Σ_k gate[t, k] · out[place[t, k]], float32 sums, rounded once.

#include "bf16.h"
#include "threads.h"

// out [tokens * top_k, width] sorted by expert, place [tokens, top_k], gate [tokens, top_k], y [tokens, width]; width is
// a multiple of 16.
extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads) {
    polymoe::parallel_for(tokens, 4, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
            for (int64_t d = 0; d < width; d += 16) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t k = 0; k < top_k; ++k)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(gate[t * top_k + k]),
                                          load_bf16(out + place[t * top_k + k] * width + d), sum);
                store_bf16(y + t * width + d, sum);
            }
    });
}
