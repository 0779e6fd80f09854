// The routed experts of one layer in bfloat16, gated by SiLU, without biases: sort by expert, gate and up, down, weigh and
// sum. See compressed_experts.py and grouped_experts.py for the equations and the torch fallback, product.h for products.

#include "product.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

namespace polymoe {
namespace {

// Memory that is kept from call to call.
struct Workspace {
    Segments segments;
    Inputs inputs;
    std::vector<int64_t> place;
    std::vector<Place> order;
    std::vector<uint16_t> active, out;
};

// A matrix of all experts, and the bits that rows are rounded to before they meet tiles.
struct Matrix {
    const Stack *bases, *deltas;
    int64_t bits;
};

void run(const uint16_t* hidden, const int32_t* base, const int32_t* delta, const int8_t* sign, const float* gate,
         int64_t tokens, int64_t top_k, int64_t width, int64_t inner, const Matrix& gate_up, const Matrix& down,
         const uint16_t* absent, uint16_t* y, int num_threads) {
    static thread_local Workspace kept;
    auto& [segments, inputs, place, order, active, out] = kept;  // helpers see the caller's
    const int64_t pairs = tokens * top_k, num_absent = sort_pairs(base, delta, sign, pairs, order, place);
    const int64_t here = static_cast<int64_t>(order.size());
    const bool coarse = std::min(gate_up.bits, down.bits) == 8;
    segments.clear();
    for (int64_t i = 0; i < here; ++i) {
        const Place& its = order[i];
        const bool other_base = i == 0 || order[i - 1].base != its.base;
        if (other_base || order[i - 1].delta != its.delta) {
            const Entry of_delta = find(gate_up.deltas, its.delta / 2 - 1);
            segments.add(other_base, {{find(gate_up.bases, its.base), of_delta, its.delta % 2 ? -1.0f : 1.0f}, i, i});
        }
        segments.rows.back().last = i + 1;
        place[its.pair] = i;
    }
    segments.end();
    const auto grow = [](std::vector<uint16_t>& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    };
    grow(active, here * inner), grow(out, pairs * width);
    if (here) {
        inputs.fill(here, width, gate_up.bits, num_threads, [&](int64_t r) { return hidden + order[r].pair / top_k * width; });
        Product<uint16_t>{width, inner, true, gate_up.bases, gate_up.deltas, inputs, nullptr, coarse, active.data()}
            .run(segments, num_threads);
        inputs.fill(here, inner, down.bits, num_threads, [&](int64_t r) { return active.data() + r * inner; });
        Product<uint16_t>{inner, width, false, down.bases, down.deltas, inputs, nullptr, coarse, out.data()}
            .run(segments, num_threads);
    }
    if (num_absent) {
        std::copy(absent, absent + num_absent * width, out.data() + here * width);
        for (int64_t i = 0; i < pairs; ++i)
            if (base[i] < 0) place[i] += here;
    }
    polymoe_combine_bf16(out.data(), place.data(), gate, tokens, top_k, width, y, num_threads);
}

Stack stored(const uint16_t* experts, int64_t count) {
    Stack stack{};
    stack.kind = STORED, stack.count = count, stack.data = reinterpret_cast<const uint8_t*>(experts), stack.type = BF16;
    return stack;
}

}  // namespace
}  // namespace polymoe

// hidden [tokens, width]; physical [tokens, top_k], ids below num_experts; gate [tokens, top_k];
// gate_up [num_experts, 2 * inner, width]; down [num_experts, width, inner]; y [tokens, width].
// width and inner are multiples of 32.
extern "C" void polymoe_experts_bf16(const uint16_t* hidden, const int32_t* physical, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, int64_t inner, int64_t num_experts,
                                     const uint16_t* gate_up, const uint16_t* down, uint16_t* y, int num_threads) {
    using namespace polymoe;
    const Stack of_gate_up = stored(gate_up, num_experts), of_down = stored(down, num_experts);
    run(hidden, physical, nullptr, nullptr, gate, tokens, top_k, width, inner, {&of_gate_up, nullptr, 0}, {&of_down, nullptr, 0},
        nullptr, y, num_threads);
}

// hidden [tokens, width]; base, delta and sign [tokens, top_k]: ids over all bases and all deltas, -1 is no delta, and
// null is none at all (of signs: all 1); gate [tokens, top_k]; pools of [2 * inner, width] (gate_up) and [width, inner]
// (down); y [tokens, width]. Where base < 0 the outputs are rows of `absent`, in the order of the pairs.
// width and inner are multiples of 32.
extern "C" void polymoe_packed_experts_bf16(const uint16_t* hidden, const int32_t* base, const int32_t* delta,
                                            const int8_t* sign, const float* gate, int64_t tokens, int64_t top_k,
                                            int64_t width, int64_t inner, const polymoe::Stack* gate_up_bases,
                                            const polymoe::Stack* gate_up_deltas, const polymoe::Stack* down_bases,
                                            const polymoe::Stack* down_deltas, const uint16_t* absent, uint16_t* y,
                                            int num_threads) {
    polymoe::run(hidden, base, delta, sign, gate, tokens, top_k, width, inner, {gate_up_bases, gate_up_deltas, 0},
                 {down_bases, down_deltas, 0}, absent, y, num_threads);
}

// The same where pools are in tiles. up_bits, down_bits: of activations, 8 or 16; 0 where no matrix is in tiles.
extern "C" void polymoe_tiled_experts_bf16(const uint16_t* hidden, const int32_t* base, const int32_t* delta,
                                           const int8_t* sign, const float* gate, int64_t tokens, int64_t top_k,
                                           int64_t width, int64_t inner, const polymoe::Stack* gate_up_bases,
                                           const polymoe::Stack* gate_up_deltas, const polymoe::Stack* down_bases,
                                           const polymoe::Stack* down_deltas, int64_t up_bits, int64_t down_bits,
                                           const uint16_t* absent, uint16_t* y, int num_threads) {
    polymoe::run(hidden, base, delta, sign, gate, tokens, top_k, width, inner, {gate_up_bases, gate_up_deltas, up_bits},
                 {down_bases, down_deltas, down_bits}, absent, y, num_threads);
}
