// Causal attention over the paged cache in bfloat16, each query token by itself, without gathering keys and values first.
//
//     out_h = Σ_t softmax_t(scaling · q_h · k_t + bias_ht) v_t ,   t = first .. visible - 1 of the sequence's own blocks
//
// One piece of work is a query token and a key head with all the query heads that share it. Scores and sums are float32.

#include <algorithm>

#include "../threads.h"
#include "vectors.h"

namespace polymoe {
namespace {

// Positions of a sequence: slots[t] says in which slot of the cache the t-th one seen is.
struct Seen {
    const int64_t* slots;
    int64_t count, stride;  // stride: values from one slot to the next
    const uint16_t* at(const uint16_t* cache, int64_t t) const { return cache + slots[t] * stride; }
};

// scores [h * count + t] of HEADS heads: query [HEADS, dim] · key, scaled.
template <int HEADS>
void score(const float* query, int64_t dim, const uint16_t* key, const Seen& seen, float scaling, float* scores) {
    for (int64_t t = 0; t < seen.count; ++t) {
        if (t + 4 < seen.count) __builtin_prefetch(seen.at(key, t + 4)), __builtin_prefetch(seen.at(key, t + 4) + 32);
        const uint16_t* k = seen.at(key, t);
        Floats sum[HEADS][2] = {};
        for (int64_t d = 0; d < dim; d += 2 * W)
            for (int i = 0; i < 2; ++i) {
                const Floats part = load(k + d + i * W);
                for (int h = 0; h < HEADS; ++h) sum[h][i] += part * load(query + h * dim + d + i * W);
            }
        for (int h = 0; h < HEADS; ++h) scores[h * seen.count + t] = scaling * sum_of(sum[h][0] + sum[h][1]);
    }
}

// In place; returns what to divide by.
float exponentials(float* scores, int64_t count) {
    float highest = scores[0];
    for (int64_t t = 1; t < count; ++t) highest = scores[t] > highest ? scores[t] : highest;
    for (int64_t t = 0; t < count; ++t) scores[t] = exp_negative(scores[t] - highest);
    float lanes[16] = {};
    int64_t t = 0;
    for (; t + 16 <= count; t += 16)
        for (int i = 0; i < 16; ++i) lanes[i] += scores[t + i];
    float total = 0;
    for (; t < count; ++t) total += scores[t];
    for (int i = 0; i < 16; ++i) total += lanes[i];
    return total;
}

// out [HEADS, dim] = Σ_t weights[h * count + t] · value_t / total[h]
template <int HEADS>
void weigh(const float* weights, const float* total, int64_t dim, const uint16_t* value, const Seen& seen, uint16_t* out) {
    for (int64_t d = 0; d < dim; d += 2 * W) {
        Floats sum[HEADS][2] = {};
        for (int64_t t = 0; t < seen.count; ++t) {
            const uint16_t* v = seen.at(value, t) + d;
            const Floats one = load(v), two = load(v + W);
            for (int h = 0; h < HEADS; ++h) {
                const Floats weight = all(weights[h * seen.count + t]);
                sum[h][0] += weight * one, sum[h][1] += weight * two;
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            float row[2 * W];
            store(row, sum[h][0] / total[h]), store(row + W, sum[h][1] / total[h]);
            for (int i = 0; i < 2 * W; ++i) out[h * dim + d + i] = to_bf16(row[i]);
        }
    }
}

template <int HEADS>
void attend(const float* query, int64_t key_dim, int64_t value_dim, const uint16_t* key, const uint16_t* value,
            const Seen& keys, const Seen& values, float scaling, const float* bias, int64_t bias_width, float* scores,
            uint16_t* out) {
    const int64_t count = keys.count;
    float total[HEADS];
    score<HEADS>(query, key_dim, key, keys, scaling, scores);
    for (int h = 0; h < HEADS; ++h) {
        for (int64_t t = 0; bias && t < count; ++t) scores[h * count + t] += bias[h * bias_width + t];
        total[h] = exponentials(scores + h * count, count);
    }
    weigh<HEADS>(scores, total, value_dim, value, values, out);
}

}  // namespace
}  // namespace polymoe

// query [num_tokens, q_heads, key_dim]; key [blocks, block_size, kv_heads, key_dim], value likewise with value_dim;
// block_table [*, table_width]; token n is of the sequence with row sequence[n] there and sees its first visible[n]
// positions, of these the last `window` (0: all), or those from start[n] on (start may be null). bias (may be null)
// [num_tokens, q_heads, bias_width], its first entry for the first position seen. out [num_tokens, q_heads, value_dim].
// key_dim is a multiple of 32, value_dim of 16.
extern "C" void polymoe_paged_attention_bf16(const uint16_t* query, const uint16_t* key, const uint16_t* value,
                                             const int64_t* block_table, int64_t table_width, const int64_t* sequence,
                                             const int64_t* visible, const int64_t* start, const float* bias,
                                             int64_t bias_width, int64_t window, int64_t num_tokens, int64_t q_heads,
                                             int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_size,
                                             float scaling, uint16_t* out, int num_threads) {
    using namespace polymoe;
    const int64_t heads = q_heads / kv_heads;
    parallel_for(num_tokens * kv_heads, 1, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<float> scores, wide;
        static thread_local std::vector<int64_t> slots;
        wide.resize(heads * key_dim);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t n = piece / kv_heads, head = piece % kv_heads;
            const int64_t oldest = window && visible[n] > window ? visible[n] - window : 0;
            const int64_t first = start ? start[n] : oldest, count = visible[n] - first;
            const int64_t* blocks = block_table + sequence[n] * table_width;
            scores.resize(4 * count);
            slots.resize(count);
            for (int64_t t = 0; t < count; ++t)
                slots[t] = blocks[(first + t) / block_size] * block_size + (first + t) % block_size;
            const int64_t row = n * q_heads + head * heads;
            for (int64_t i = 0; i < heads * key_dim; ++i) wide[i] = from_bf16(query[row * key_dim + i]);
            const Seen keys{slots.data(), count, kv_heads * key_dim}, values{slots.data(), count, kv_heads * value_dim};
            for (int64_t h = 0; h < heads;) {
                const int64_t taken = heads - h >= 4 ? 4 : heads - h >= 2 ? 2 : 1;
                (taken == 4 ? attend<4> : taken == 2 ? attend<2> : attend<1>)(
                    wide.data() + h * key_dim, key_dim, value_dim, key + head * key_dim, value + head * value_dim, keys, values,
                    scaling, bias ? bias + (row + h) * bias_width : nullptr, bias_width, scores.data(), out + (row + h) * value_dim);
                h += taken;
            }
        }
    });
}
