// Grouped linear in bfloat16: y_r = W_g(r) x_r + b_g(r). See linear.h for how, grouped_linear.py for the torch fallback.
// Built by hatch_build.py; called through ctypes. Needs AVX512-BF16 and a multiple of 32 inputs.

#include "linear.h"

// x [rows, in], y [rows, out]; group g has rows starts[g] .. starts[g + 1] and uses weight ids[g] of stack [*, out, in]
// and, unless bias is null, of bias [*, out].
extern "C" void polymoe_grouped_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_groups,
                                            const int64_t* ids, const int64_t* starts, const uint16_t* stack,
                                            const uint16_t* bias, uint16_t* y, int num_threads) {
    static thread_local polymoe::Scratch scratch;
    static thread_local std::vector<const uint16_t*> weights, biases;
    weights.clear();
    biases.clear();
    for (int64_t g = 0; g < num_groups; ++g) {
        weights.push_back(stack + ids[g] * out * in);
        if (bias) biases.push_back(bias + ids[g] * out);
    }
    polymoe::run({x, nullptr, in, out, num_groups, starts, weights.data(), bias ? biases.data() : nullptr, false, y},
                 scratch, num_threads);
}
