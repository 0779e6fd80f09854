// The routed experts of one layer in bfloat16, gated by SiLU, without biases: sort by expert, gate and up, down, weigh
// and sum. See grouped_experts.py for the equation and the torch fallback, linear.h for the products.

#include "linear.h"

extern "C" void polymoe_combine_bf16(const uint16_t* out, const int64_t* place, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, uint16_t* y, int num_threads);

// hidden [tokens, width]; physical [tokens, top_k], ids below num_experts; gate [tokens, top_k];
// gate_up [num_experts, 2 * inner, width]; down [num_experts, width, inner]; y [tokens, width].
// width and inner are multiples of 32.
extern "C" void polymoe_experts_bf16(const uint16_t* hidden, const int32_t* physical, const float* gate, int64_t tokens,
                                     int64_t top_k, int64_t width, int64_t inner, int64_t num_experts,
                                     const uint16_t* gate_up, const uint16_t* down, uint16_t* y, int num_threads) {
    static thread_local polymoe::Scratch scratch;
    static thread_local std::vector<int64_t> next, starts, row_of, place;
    static thread_local std::vector<uint16_t> active, out;
    static thread_local std::vector<const uint16_t*> gate_ups, downs;
    const int64_t pairs = tokens * top_k;

    // A counting sort; groups are the experts that some token was routed to.
    next.assign(num_experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) ++next[physical[i] + 1];
    starts.assign(1, 0);
    gate_ups.clear();
    downs.clear();
    for (int64_t e = 0; e < num_experts; ++e) {
        if (next[e + 1]) {
            starts.push_back(starts.back() + next[e + 1]);
            gate_ups.push_back(gate_up + e * 2 * inner * width);
            downs.push_back(down + e * width * inner);
        }
        next[e + 1] += next[e];
    }
    row_of.resize(pairs);
    place.resize(pairs);
    for (int64_t i = 0; i < pairs; ++i) {
        place[i] = next[physical[i]]++;
        row_of[place[i]] = i / top_k;
    }

    if (static_cast<int64_t>(active.size()) < pairs * inner) active.resize(pairs * inner);
    if (static_cast<int64_t>(out.size()) < pairs * width) out.resize(pairs * width);
    const int64_t groups = static_cast<int64_t>(downs.size());
    polymoe::run({hidden, row_of.data(), width, inner, groups, starts.data(), gate_ups.data(), nullptr, true, active.data()},
                 scratch, num_threads);
    polymoe::run({active.data(), nullptr, inner, width, groups, starts.data(), downs.data(), nullptr, false, out.data()},
                 scratch, num_threads);
    polymoe_combine_bf16(out.data(), place.data(), gate, tokens, top_k, width, y, num_threads);
}
