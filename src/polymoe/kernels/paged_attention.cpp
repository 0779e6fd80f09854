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

constexpr int HEADS = 4;      // query heads of a tile
constexpr int POSITIONS = 4;  // keys of a tile: 4 x 4 sums in registers

struct Sequence {
    const int64_t* blocks;
    int64_t block_size, stride;  // stride: values from one position of a block to the next
    const uint16_t* at(const uint16_t* cache, int64_t t) const {
        return cache + (blocks[t / block_size] * block_size + t % block_size) * stride;
    }
};

// scores [heads, count]: query · key, scaled. Tiles past the end repeat the last row and write nothing.
void score(const uint16_t* query, int64_t heads, int64_t dim, const uint16_t* key, const Sequence& seq, int64_t first,
           int64_t count, float scaling, float* scores) {
    for (int64_t t = 0; t < count; t += POSITIONS) {
        const uint16_t* k[POSITIONS];
        for (int p = 0; p < POSITIONS; ++p) k[p] = seq.at(key, first + (t + p < count ? t + p : count - 1));
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
void weigh(const float* weights, const float* total, int64_t heads, int64_t dim, const uint16_t* value,
           const Sequence& seq, int64_t first, int64_t count, uint16_t* out) {
    for (int64_t h = 0; h < heads; h += HEADS)
        for (int64_t d = 0; d < dim; d += 64) {
            const int width = dim - d >= 64 ? 4 : static_cast<int>((dim - d) / 16);
            __m512 sum[HEADS][4];
            for (auto& row : sum)
                for (auto& s : row) s = _mm512_setzero_ps();
            for (int64_t t = 0; t < count; ++t) {
                const uint16_t* v = seq.at(value, first + t) + d;
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
        total.resize(heads);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t n = piece / kv_heads, head = piece % kv_heads;
            const int64_t oldest = window && visible[n] > window ? visible[n] - window : 0;
            const int64_t first = start ? start[n] : oldest;
            const int64_t count = visible[n] - first;
            const int64_t* blocks = block_table + sequence[n] * table_width;
            scores.resize(heads * count);
            const Sequence keys = {blocks, block_size, kv_heads * key_dim};
            const Sequence values = {blocks, block_size, kv_heads * value_dim};
            score(query + (n * q_heads + head * heads) * key_dim, heads, key_dim, key + head * key_dim, keys, first, count,
                  scaling, scores.data());
            for (int64_t h = 0; bias && h < heads; ++h) {
                const float* own = bias + (n * q_heads + head * heads + h) * bias_width;
                for (int64_t t = 0; t < count; ++t) scores[h * count + t] += own[t];
            }
            for (int64_t h = 0; h < heads; ++h) total[h] = exponentials(scores.data() + h * count, count);
            weigh(scores.data(), total.data(), heads, value_dim, value + head * value_dim, values, first, count,
                  out + (n * q_heads + head * heads) * value_dim);
        }
    });
}
