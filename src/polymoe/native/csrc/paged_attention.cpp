// Causal attention over the paged cache in bfloat16, each query token by itself, without gathering keys and values first.
//
//     out_h = Σ_t softmax_t(scaling · q_h · k_t + bias_ht) v_t ,   t = first .. visible - 1 of the sequence's own blocks
//
// One piece of work is a query token and a key head with all the query heads that share it. The tokens of a prompt come
// one after the other and find their sequence's keys and values in the caches. Scores and sums are float32. Needs AVX512-BF16, key_dim a multiple of 32 and value_dim of 16.

#include <vector>

#include "bf16.h"
#include "threads.h"

namespace {

// A tile is HEADS query heads by 16 / HEADS keys: 16 sums in registers. 4 x 4, or 1 x 16 where no key head has several
// query heads.

// Positions of a sequence: slots[t] says in which slot of the cache the t-th one seen is.
struct Seen {
    const int64_t* slots;
    int64_t count, stride;  // stride: values from one slot to the next
    const uint16_t* at(const uint16_t* cache, int64_t t) const { return cache + slots[t] * stride; }
};

void find_slots(const int64_t* blocks, int64_t block_size, int64_t first, int64_t count, int64_t* slots) {
    int64_t block = first / block_size, place = first % block_size;
    for (int64_t t = 0; t < count; ++t) {
        slots[t] = blocks[block] * block_size + place;
        if (++place == block_size) ++block, place = 0;
    }
}

inline void fetch(const uint16_t* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// scores [heads, count]: query · key, scaled. Tiles past the end repeat the last row and write nothing. A position's keys
// are far from the next one's, so those of the next tile are fetched meanwhile, and the values that are wanted next.
template <int HEADS>
void score(const uint16_t* query, int64_t heads, int64_t dim, const uint16_t* key, const Seen& seen, float scaling,
           float* scores, const uint16_t* value, const Seen& values, int64_t value_dim) {
    constexpr int POSITIONS = 16 / HEADS;
    const int64_t count = seen.count;
    for (int64_t t = 0; t < count; t += POSITIONS) {
        for (int64_t p = t; p < t + POSITIONS && p < count; ++p) {
            if (p + POSITIONS < count) fetch(seen.at(key, p + POSITIONS), dim);
            fetch(values.at(value, p), value_dim);
        }
        const uint16_t* k[POSITIONS];
        for (int p = 0; p < POSITIONS; ++p) k[p] = seen.at(key, t + p < count ? t + p : count - 1);
        for (int64_t h = 0; h < heads; h += HEADS) {
            __m512 sum[16];
            for (auto& s : sum) s = _mm512_setzero_ps();
            for (int64_t d = 0; d < dim; d += 32) {
                __m512bh row[POSITIONS];
                for (int p = 0; p < POSITIONS; ++p) row[p] = (__m512bh)_mm512_loadu_si512(k[p] + d);
                for (int i = 0; i < HEADS; ++i) {
                    const int64_t head = h + i < heads ? h + i : heads - 1;
                    const __m512bh q = (__m512bh)_mm512_loadu_si512(query + head * dim + d);
                    for (int p = 0; p < POSITIONS; ++p)
                        sum[i * POSITIONS + p] = _mm512_dpbf16_ps(sum[i * POSITIONS + p], q, row[p]);
                }
            }
            alignas(64) float tile[16];
            _mm512_store_ps(tile, _mm512_mul_ps(add_lanes(sum), _mm512_set1_ps(scaling)));
            for (int i = 0; i < HEADS && h + i < heads; ++i)
                for (int p = 0; p < POSITIONS && t + p < count; ++p)
                    scores[(h + i) * count + t + p] = tile[i * POSITIONS + p];
        }
    }
}

// In place; returns what to divide by.
float exponentials(float* scores, int64_t count) {
    float highest = scores[0];
    for (int64_t t = 1; t < count; ++t) highest = scores[t] > highest ? scores[t] : highest;
    const __m512 shift = _mm512_set1_ps(highest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
        const __mmask16 valid = count - t >= 16 ? 0xffff : (__mmask16)((1u << (count - t)) - 1);
        const __m512 e = exp_negative(_mm512_sub_ps(_mm512_maskz_loadu_ps(valid, scores + t), shift));
        _mm512_mask_storeu_ps(scores + t, valid, e);
        total = _mm512_mask_add_ps(total, valid, total, e);
    }
    return _mm512_reduce_add_ps(total);
}

// out [heads, dim] = Σ_t weights[h, t] · value_t / total[h]
template <int HEADS>
void weigh(const float* weights, const float* total, int64_t heads, int64_t dim, const uint16_t* value,
           const Seen& seen, uint16_t* out) {
    const int64_t count = seen.count;
    for (int64_t h = 0; h < heads; h += HEADS)
        for (int64_t d = 0; d < dim; d += 64) {
            const int width = dim - d >= 64 ? 4 : static_cast<int>((dim - d) / 16);
            __m512 sum[HEADS][4];
            for (auto& row : sum)
                for (auto& s : row) s = _mm512_setzero_ps();
            for (int64_t t = 0; t < count; ++t) {
                const uint16_t* v = seen.at(value, t) + d;
                for (int c = 0; c < width; ++c) {
                    const __m512 part = load_bf16(v + 16 * c);
                    for (int i = 0; i < HEADS; ++i) {
                        const int64_t head = h + i < heads ? h + i : heads - 1;
                        sum[i][c] = _mm512_fmadd_ps(_mm512_set1_ps(weights[head * count + t]), part, sum[i][c]);
                    }
                }
            }
            for (int i = 0; i < HEADS && h + i < heads; ++i)
                for (int c = 0; c < width; ++c)
                    store_bf16(out + (h + i) * dim + d + 16 * c, _mm512_div_ps(sum[i][c], _mm512_set1_ps(total[h + i])));
        }
}

template <int HEADS>
void attend(const uint16_t* query, int64_t heads, int64_t key_dim, int64_t value_dim, const uint16_t* key,
            const uint16_t* value, const Seen& keys, const Seen& values, float scaling, const float* bias,
            int64_t bias_width, float* scores, float* total, uint16_t* out) {
    const int64_t count = keys.count;
    score<HEADS>(query, heads, key_dim, key, keys, scaling, scores, value, values, value_dim);
    for (int64_t h = 0; bias && h < heads; ++h)
        for (int64_t t = 0; t < count; ++t) scores[h * count + t] += bias[h * bias_width + t];
    for (int64_t h = 0; h < heads; ++h) total[h] = exponentials(scores + h * count, count);
    weigh<HEADS>(scores, total, heads, value_dim, value, values, out);
}

}  // namespace

// query [num_tokens, q_heads, key_dim]; key [blocks, block_size, kv_heads, key_dim], value likewise with value_dim;
// block_table [*, table_width]; token n is of the sequence with row sequence[n] there and sees its first visible[n]
// positions, of these the last `window` (0: all), or those from start[n] on (start may be null). bias (may be null)
// [num_tokens, q_heads, bias_width], its first entry for the first position seen. out [num_tokens, q_heads, value_dim].
extern "C" void polymoe_paged_attention_bf16(const uint16_t* query, const uint16_t* key, const uint16_t* value,
                                             const int64_t* block_table, int64_t table_width, const int64_t* sequence,
                                             const int64_t* visible, const int64_t* start, const float* bias,
                                             int64_t bias_width, int64_t window, int64_t num_tokens, int64_t q_heads,
                                             int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_size,
                                             float scaling, uint16_t* out, int num_threads) {
    const int64_t heads = q_heads / kv_heads;
    polymoe::parallel_for(num_tokens * kv_heads, 1, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<float> scores, total;
        static thread_local std::vector<int64_t> slots;
        total.resize(heads);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t n = piece / kv_heads, head = piece % kv_heads;
            const int64_t oldest = window && visible[n] > window ? visible[n] - window : 0;
            const int64_t first = start ? start[n] : oldest;
            const int64_t count = visible[n] - first;
            scores.resize(heads * count);
            slots.resize(count);
            find_slots(block_table + sequence[n] * table_width, block_size, first, count, slots.data());
            const int64_t row = n * q_heads + head * heads;
            (heads == 1 ? attend<1> : attend<4>)(
                query + row * key_dim, heads, key_dim, value_dim, key + head * key_dim, value + head * value_dim,
                {slots.data(), count, kv_heads * key_dim}, {slots.data(), count, kv_heads * value_dim}, scaling,
                bias ? bias + row * bias_width : nullptr, bias_width, scores.data(), total.data(), out + row * value_dim);
        }
    });
}
