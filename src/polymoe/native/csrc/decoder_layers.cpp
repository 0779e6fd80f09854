// Decoder layers of a step in bfloat16, from hidden states to hidden states:
//
//     h = x + c attention(norm(x)),   y = h + c experts(norm(h))
//
// See decoder_layer.py; no vectors here, so every instruction set's kernels are called.

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

// `count` layers one after the other. x, y [tokens, width]; cos, sin [tokens, rotary]. Returns 0; or 1 where an expert is
// absent: then y is no result, and some of the step's keys and values are in the cache.
extern "C" int polymoe_decoder_layers_bf16(const polymoe::DecoderLayer* const* layers, int64_t count,
                                           const polymoe::Step* step, const uint16_t* x, const uint16_t* cos,
                                           const uint16_t* sin, int64_t rotary, uint16_t* y, int threads) {
    for (int64_t i = 0; i < count; ++i)
        if (!polymoe::run(*layers[i], step, i ? y : x, cos, sin, rotary, y, threads)) return 1;
    return 0;
}
