// A decoder layer of a step in bfloat16, from hidden states to hidden states, and a whole pass, from tokens to logits:
//
//     h = x + c attention(norm(x)),   y = h + c experts(norm(h))
//
// See decoder.py; no vectors here, so every instruction set's kernels are called.

#include <string.h>

#include <vector>

#include "scalars.h"
#include "step.h"
#include "threads.h"

extern "C" {
void polymoe_attention_layer_bf16(const void*, const polymoe::Step*, const uint16_t*, const uint16_t*, const uint16_t*, int64_t,
                                  uint16_t*, int);
void polymoe_router_bf16(const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const uint16_t*, int64_t,
                         int64_t, uint16_t*, float*, int64_t*, int);
int polymoe_routed_experts_bf16(const void*, const uint16_t*, const int64_t*, const int64_t*, const float*, int64_t, int64_t,
                                uint16_t*, int);
}

namespace polymoe {
namespace {

struct Router {
    const uint16_t* weights;  // [versions, experts, width]
    int64_t grouping, experts, top_k, scoring;
    int64_t rounds;  // whether its scores are bfloat16
};

struct DecoderLayer {
    Norm first, second;
    const void *attention, *experts;  // `Layer` of attention_layer.cpp, `RoutedLayer` of routed_experts.cpp
    Router router;
    int64_t width;
    float multiplier;  // c
};

struct Embedding {
    const uint16_t* rows;  // [versions, vocabulary, width]
    int64_t grouping, vocabulary;
    float multiplier;

    bool look_up(const int64_t* ids, const Step* step, int64_t width, uint16_t* y) const {
        const int64_t* version = step->groupings[grouping].of_token;
        for (int64_t t = 0; t < step->tokens; ++t, y += width) {
            if (ids[t] < 0 || ids[t] >= vocabulary) return false;
            const uint16_t* row = rows + (version[t] * vocabulary + ids[t]) * width;
            for (int64_t i = 0; i < width; ++i) y[i] = to_bf16(bf16_value(row[i]) * multiplier);
        }
        return true;
    }
};

struct Pass {
    const DecoderLayer* const* layers;
    int64_t count;
    Embedding embedding;
    Norm norm;
    Projection head;
};

// y = x + c a, [tokens, width], rounded where torch's operations round.
void add(const uint16_t* x, const uint16_t* a, float c, int64_t tokens, int64_t width, uint16_t* y, int threads) {
    parallel_for(tokens, 8, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first * width; i < last * width; ++i)
            y[i] = to_bf16(bf16_value(x[i]) + rounded_bf16(bf16_value(a[i]) * c));
    });
}

// x, y [tokens, width]; y may be x. False where an expert is absent.
bool run(const DecoderLayer& layer, const Step* step, const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
         int64_t rotary, uint16_t* y, int threads) {
    static thread_local std::vector<uint16_t> normed, found, logits;
    static thread_local std::vector<float> scores;
    static thread_local std::vector<int64_t> chosen;
    const int64_t tokens = step->tokens, width = layer.width;
    const Router& router = layer.router;
    normed.resize(tokens * width), found.resize(tokens * width);
    logits.resize(tokens * router.experts), scores.resize(tokens * router.top_k), chosen.resize(tokens * router.top_k);
    layer.first.run(x, step->groupings, 1, tokens, width, normed.data(), threads);
    polymoe_attention_layer_bf16(layer.attention, step, normed.data(), cos, sin, rotary, found.data(), threads);
    add(x, found.data(), layer.multiplier, tokens, width, y, threads);
    layer.second.run(y, step->groupings, 1, tokens, width, normed.data(), threads);
    const Grouping& groups = step->groupings[router.grouping];
    polymoe_router_bf16(normed.data(), width, router.experts, groups.count, groups.ids, groups.starts, router.weights,
                        router.top_k, router.scoring, logits.data(), scores.data(), chosen.data(), threads);
    if (router.rounds)
        for (float& score : scores) score = rounded_bf16(score);
    if (polymoe_routed_experts_bf16(layer.experts, normed.data(), step->variant, chosen.data(), scores.data(), tokens,
                                    router.top_k, found.data(), threads))
        return false;
    add(y, found.data(), layer.multiplier, tokens, width, y, threads);
    return true;
}

}  // namespace
}  // namespace polymoe

// x, y [tokens, width]; cos, sin [tokens, rotary]. Returns 0; or 1 where an expert is absent: then y is no result, and the
// step's keys and values are in the cache.
extern "C" int polymoe_decoder_layer_bf16(const polymoe::DecoderLayer* layer, const polymoe::Step* step, const uint16_t* x,
                                          const uint16_t* cos, const uint16_t* sin, int64_t rotary, uint16_t* y, int threads) {
    return polymoe::run(*layer, step, x, cos, sin, rotary, y, threads) ? 0 : 1;
}

// y: logits [kept, pass.head.out] of rows kept[0] … of the step, or without a head their states [kept, width]. Hidden states before the first layer are `hidden` [tokens,
// width] or, where that is null, embeddings of `ids` [tokens]; token t turns by rows positions[t] of cos and sin [*, rotary].
// Returns 0; 1 as above; or 2 where an id is none of the vocabulary.
extern "C" int polymoe_pass_bf16(const polymoe::Pass* pass, const polymoe::Step* step, const uint16_t* hidden,
                                 const int64_t* ids, const int64_t* positions, const uint16_t* cos, const uint16_t* sin,
                                 int64_t rotary, const int64_t* kept, int64_t num_kept, uint16_t* y, int threads) {
    using namespace polymoe;
    static thread_local std::vector<uint16_t> states, turns, last;
    static thread_local std::vector<int64_t> versions;
    const int64_t tokens = step->tokens, width = pass->layers[0]->width;
    states.resize(tokens * width), turns.resize(2 * tokens * rotary), last.resize(num_kept * width), versions.resize(num_kept);
    if (hidden) memcpy(states.data(), hidden, tokens * width * 2);
    else if (!pass->embedding.look_up(ids, step, width, states.data())) return 2;
    for (int64_t t = 0; t < tokens; ++t) {
        memcpy(&turns[t * rotary], cos + positions[t] * rotary, rotary * 2);
        memcpy(&turns[(tokens + t) * rotary], sin + positions[t] * rotary, rotary * 2);
    }
    for (int64_t i = 0; i < pass->count; ++i)
        if (!run(*pass->layers[i], step, states.data(), turns.data(), &turns[tokens * rotary], rotary, states.data(), threads))
            return 1;
    for (int64_t i = 0; i < num_kept; ++i) {
        memcpy(&last[i * width], &states[kept[i] * width], width * 2);
        versions[i] = step->groupings[pass->norm.grouping].of_token[kept[i]];
    }
    polymoe_rms_norm_bf16(last.data(), pass->norm.weights, versions.data(), 1, num_kept, width, pass->norm.eps, last.data(),
                          threads);
    if (pass->head.out) pass->head.run(last.data(), step->sampled, y, threads);
    else memcpy(y, last.data(), num_kept * width * 2);
    return 0;
}
