// Root-mean-square norm in bfloat16, each row with a weight of its own choice, and the weighted sum of a token's expert
// outputs; float32 inside, rounded where transformers' norms round. See rms_norm.py and grouped_experts.py.

#include "../threads.h"
#include "vectors.h"

// y = w ∘ bf16(x / sqrt(mean(x²) + eps)): x, y [rows, width]; weights [*, width]; row r uses row weight_of[r / repeat] of
// them, or row 0 when weight_of is null. width is a multiple of 16.
extern "C" void polymoe_rms_norm_bf16(const uint16_t* x, const uint16_t* weights, const int64_t* weight_of,
                                      int64_t repeat, int64_t rows, int64_t width, float eps, uint16_t* y,
                                      int num_threads) {
    using namespace polymoe;
    const int64_t chunk = std::max<int64_t>(1, 8192 / width);
    parallel_for(rows, chunk, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint16_t *in = x + r * width, *weight = weights + (weight_of ? weight_of[r / repeat] * width : 0);
            Floats squares[2] = {};
            for (int64_t d = 0; d < width; d += 2 * W)
                for (int i = 0; i < 2; ++i) {
                    const Floats value = load(in + d + i * W);
                    squares[i] += value * value;
                }
            const float mean = sum_of(squares[0] + squares[1]) / static_cast<float>(width);
            const float scale = 1.0f / __builtin_sqrtf(mean + eps);
            for (int64_t d = 0; d < width; ++d)
                y[r * width + d] = to_bf16(from_bf16(weight[d]) * round_bf16(from_bf16(in[d]) * scale));
        }
    });
}

// y_t = Σ_k gate[t, k] · out[place[t, k]]: out [tokens * top_k, width] sorted by expert, place [tokens, top_k], gate
// [tokens, top_k], y [tokens, width]; width is a multiple of 16.
extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads) {
    using namespace polymoe;
    parallel_for(tokens, 4, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
            for (int64_t d = 0; d < width; d += 16) {
                float sum[16] = {};
                for (int64_t k = 0; k < top_k; ++k) {
                    const uint16_t* from = out + place[t * top_k + k] * width + d;
                    const float weight = gate[t * top_k + k];
                    for (int i = 0; i < 16; ++i) sum[i] += weight * from_bf16(from[i]);
                }
                for (int i = 0; i < 16; ++i) y[t * width + d + i] = to_bf16(sum[i]);
            }
    });
}
