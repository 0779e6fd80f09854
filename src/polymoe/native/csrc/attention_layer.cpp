// One attention layer of a step in bfloat16, from hidden states to hidden states: projections, norms of heads, rotary
// embedding, the new keys and values into the cache, attention, output projection. What Python and torch would do between
// the kernels takes longer than the kernels where few tokens run. See attention_layer.py; no vectors here, so every
// instruction set's kernels are called.

#include <string.h>

#include <vector>

#include "scalars.h"
#include "step.h"
#include "threads.h"

extern "C" void polymoe_paged_attention_bf16(const uint16_t*, const uint16_t*, const uint16_t*, const int64_t*, int64_t,
                                             const int64_t*, const int64_t*, const int64_t*, const float*, int64_t, int64_t,
                                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, uint16_t*, int);

namespace polymoe {
namespace {

struct Layer {
    Projection query, key, value, output;
    Norm query_norm, key_norm;
    int64_t query_norm_dim, key_norm_dim;  // of one head, or of all of a token
    uint16_t *keys, *values;               // the cache: [slots, kv_heads, key_dim], [slots, kv_heads, value_dim]
    int64_t block_size, q_heads, kv_heads, key_dim, value_dim, window;
    float scaling;
};

// x [heads, dim] in place: the first `rotary` values of each head turned, rounded where torch's operations round.
void rotate(uint16_t* x, int64_t heads, int64_t dim, const uint16_t* cos, const uint16_t* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t h = 0; h < heads; ++h) {
        uint16_t *low = x + h * dim, *high = low + half;
        for (int64_t d = 0; d < half; ++d) {
            const float a = bf16_value(low[d]), b = bf16_value(high[d]);
            low[d] = to_bf16(rounded_bf16(a * bf16_value(cos[d])) - rounded_bf16(b * bf16_value(sin[d])));
            high[d] = to_bf16(rounded_bf16(b * bf16_value(cos[half + d])) + rounded_bf16(a * bf16_value(sin[half + d])));
        }
    }
}

}  // namespace
}  // namespace polymoe

// x [tokens, query.in], y [tokens, output.out], not x; cos, sin [tokens, rotary].
extern "C" void polymoe_attention_layer_bf16(const polymoe::Layer* layer, const polymoe::Step* step, const uint16_t* x,
                                             const uint16_t* cos, const uint16_t* sin, int64_t rotary, uint16_t* y,
                                             int threads) {
    static thread_local std::vector<uint16_t> queries, new_keys, new_values, attended;
    const auto& [query, key, value, output, query_norm, key_norm, query_norm_dim, key_norm_dim, keys, values, block_size,
                 q_heads, kv_heads, key_dim, value_dim, window, scaling] = *layer;
    const int64_t tokens = step->tokens;
    const auto grown = [](std::vector<uint16_t>& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
        return buffer.data();
    };
    uint16_t *q = grown(queries, tokens * query.out), *k = grown(new_keys, tokens * key.out);
    uint16_t *v = grown(new_values, tokens * value.out), *a = grown(attended, tokens * output.in);
    query.run(x, step->groupings, q, threads);
    key.run(x, step->groupings, k, threads);
    value.run(x, step->groupings, v, threads);
    const auto normalise = [&](const polymoe::Norm& norm, uint16_t* x, int64_t width, int64_t dim) {
        if (norm.weights) norm.run(x, step->groupings, width / dim, tokens * (width / dim), dim, x, threads);
    };
    normalise(query_norm, q, query.out, query_norm_dim);
    normalise(key_norm, k, key.out, key_norm_dim);
    polymoe::parallel_for(tokens, 8, threads, [&, keys = keys, values = values](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            uint16_t* own = k + t * layer->key.out;
            polymoe::rotate(q + t * layer->query.out, layer->q_heads, layer->key_dim, cos + t * rotary, sin + t * rotary, rotary);
            polymoe::rotate(own, layer->kv_heads, layer->key_dim, cos + t * rotary, sin + t * rotary, rotary);
            memcpy(keys + step->slots[t] * layer->key.out, own, layer->key.out * 2);
            memcpy(values + step->slots[t] * layer->value.out, v + t * layer->value.out, layer->value.out * 2);
        }
    });
    polymoe_paged_attention_bf16(q, keys, values, step->block_table, step->table_width, step->sequence, step->visible, nullptr,
                                 nullptr, 0, window, tokens, q_heads, kv_heads, key_dim, value_dim, block_size, scaling, a,
                                 threads);
    output.run(a, step->groupings, y, threads);
}
