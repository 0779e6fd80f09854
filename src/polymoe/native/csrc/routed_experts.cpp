// A layer's experts from what its router chose: which physical experts and deltas these are is looked up, then one of the
// kernels computes them. See routed_layer.py; no vectors here, so every instruction set's kernels are called.

#include <stdint.h>

#include <vector>

#include "stacks.h"

extern "C" {
void polymoe_experts_bf16(const uint16_t*, const int32_t*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                          const uint16_t*, const uint16_t*, uint16_t*, int);
void polymoe_packed_experts_bf16(const uint16_t*, const int32_t*, const int32_t*, const int8_t*, const float*, int64_t, int64_t,
                                 int64_t, int64_t, const polymoe::Stack*, const polymoe::Stack*, const polymoe::Stack*,
                                 const polymoe::Stack*, const uint16_t*, uint16_t*, int);
void polymoe_tiled_experts_bf16(const uint16_t*, const int32_t*, const int32_t*, const int8_t*, const float*, int64_t, int64_t,
                                int64_t, int64_t, const polymoe::Stack*, const polymoe::Stack*, const polymoe::Stack*,
                                const polymoe::Stack*, int64_t, int64_t, const uint16_t*, uint16_t*, int);
}

namespace polymoe {
namespace {

// One layer: its rows of the tables ([variants, *], `row` entries apart; delta and sign may be null) and its weights.
struct RoutedLayer {
    const int32_t *table, *delta;
    const int8_t* sign;
    int64_t row, width, inner, is_tiled;
    int64_t num_stored;  // of gate_up and down, where all experts are stored and there is no delta; else 0
    const uint16_t *gate_up, *down;
    const Stack *gate_up_bases, *gate_up_deltas, *down_bases, *down_deltas;
    int64_t up_bits, down_bits;
};

}  // namespace
}  // namespace polymoe

// hidden and y [tokens, width]; variant [tokens]; experts and gate [tokens, top_k]. Returns 0; or 1, and nothing is done,
// where an expert is absent.
extern "C" int polymoe_routed_experts_bf16(const polymoe::RoutedLayer* layer, const uint16_t* hidden, const int64_t* variant,
                                           const int64_t* experts, const float* gate, int64_t tokens, int64_t top_k,
                                           uint16_t* y, int num_threads) {
    static thread_local std::vector<int32_t> bases, deltas;
    static thread_local std::vector<int8_t> signs;
    const auto& l = *layer;
    bases.resize(tokens * top_k), deltas.resize(tokens * top_k), signs.resize(tokens * top_k);
    for (int64_t i = 0; i < tokens * top_k; ++i) {
        const int64_t entry = variant[i / top_k] * l.row + experts[i];
        bases[i] = l.table[entry];
        if (bases[i] < 0) return 1;
        if (l.delta) deltas[i] = l.delta[entry];
        if (l.sign) signs[i] = l.sign[entry];
    }
    if (l.num_stored) {
        polymoe_experts_bf16(hidden, bases.data(), gate, tokens, top_k, l.width, l.inner, l.num_stored, l.gate_up, l.down, y,
                             num_threads);
        return 0;
    }
    const int32_t* delta = l.delta ? deltas.data() : nullptr;
    const int8_t* sign = l.sign ? signs.data() : nullptr;
    if (l.is_tiled)
        polymoe_tiled_experts_bf16(hidden, bases.data(), delta, sign, gate, tokens, top_k, l.width, l.inner, l.gate_up_bases,
                                   l.gate_up_deltas, l.down_bases, l.down_deltas, l.up_bits, l.down_bits, nullptr, y,
                                   num_threads);
    else
        polymoe_packed_experts_bf16(hidden, bases.data(), delta, sign, gate, tokens, top_k, l.width, l.inner, l.gate_up_bases,
                                    l.gate_up_deltas, l.down_bases, l.down_deltas, nullptr, y, num_threads);
    return 0;
}
