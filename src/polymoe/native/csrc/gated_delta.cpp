// One token of gated linear attention for each of a batch of sequences, in float32. See gated_delta.py.

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace {

constexpr int64_t LANES = 16, BLOCK = 4 * LANES;  // values of a state's row that stay in registers

// The compiler's, so that this source serves every level (hatch_build.py).
typedef float Floats __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
    Floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

inline void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }

// The factor of a key or query: 1 / sqrt(sum of squares + 1e-6), or 1.
float inverse_norm(const float* x, int64_t width, bool normalise) {
    if (!normalise) return 1.0f;
    float squares = 0.0f;
    for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares + 1e-6f);
}

// `columns` registers of the state's values at once; state and out point to the first of them.
template <int columns>
void step(float* state, const float* key, const float* query, const float* value, float decay, float beta, float by_key,
          float by_query, int64_t keys, int64_t values, float* out) {
    Floats known[columns], change[columns], sum[columns];
    for (int c = 0; c < columns; ++c) known[c] = sum[c] = Floats{};
    for (int64_t k = 0; k < keys; ++k)
        for (int c = 0; c < columns; ++c) known[c] += load(state + k * values + c * LANES) * key[k];
    const float told = decay * by_key;
    for (int c = 0; c < columns; ++c) change[c] = (load(value + c * LANES) - known[c] * told) * beta;
    for (int64_t k = 0; k < keys; ++k) {
        const float along = key[k] * by_key;
        for (int c = 0; c < columns; ++c) {
            float* place = state + k * values + c * LANES;
            const Floats next = change[c] * along + load(place) * decay;
            store(place, next);
            sum[c] += next * query[k];
        }
    }
    for (int c = 0; c < columns; ++c) store(out + c * LANES, sum[c] * by_query);
}

}  // namespace

// state [B, H, K, V], changed in place; query, key [B, G, K], head h reads row h / (H / G); value, out [B, H, V]; gate,
// beta [B, H]. V is a multiple of 16.
extern "C" void polymoe_gated_delta_f32(float* state, const float* query, const float* key, const float* value,
                                        const float* gate, const float* beta, int64_t batch, int64_t heads,
                                        int64_t key_heads, int64_t keys, int64_t values, int normalise, float* out,
                                        int num_threads) {
    const int64_t chunk = std::max<int64_t>(1, 32768 / (keys * values));
    const float scale = 1.0f / std::sqrt(static_cast<float>(keys));
    polymoe::parallel_for(batch * heads, chunk, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / heads * key_heads + i % heads / (heads / key_heads);
            const float *k = key + row * keys, *q = query + row * keys;
            const float by_key = inverse_norm(k, keys, normalise), by_query = inverse_norm(q, keys, normalise) * scale;
            const float decay = std::exp(gate[i]);
            float* own = state + i * keys * values;
            const float* v = value + i * values;
            int64_t c = 0;
            for (; c + BLOCK <= values; c += BLOCK)
                step<4>(own + c, k, q, v + c, decay, beta[i], by_key, by_query, keys, values, out + i * values + c);
            for (; c < values; c += LANES)
                step<1>(own + c, k, q, v + c, decay, beta[i], by_key, by_query, keys, values, out + i * values + c);
        }
    });
}
