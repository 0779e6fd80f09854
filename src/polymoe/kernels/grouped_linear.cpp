// Grouped linear in bfloat16: y_r = W_g(r) x_r + b_g(r). See linear.h for how, grouped_linear.py for the torch fallback.
// Built by hatch_build.py; called through ctypes. Needs AVX512-BF16 and a multiple of 32 inputs.

#include "linear.h"

// x [rows, in], y [rows, out]; group g has rows starts[g] .. starts[g + 1], weights[g] [out, in] and, unless biases is
// null, biases[g] [out].
extern "C" void polymoe_grouped_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_groups,
                                            const int64_t* starts, const uint16_t* const* weights,
                                            const uint16_t* const* biases, uint16_t* y, int num_threads) {
    static thread_local polymoe::Scratch scratch;
    polymoe::run({x, nullptr, in, out, num_groups, starts, weights, biases, false, y}, scratch, num_threads);
}
