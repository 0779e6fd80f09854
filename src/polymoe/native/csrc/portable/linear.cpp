// One product a call: rows in order, each segment with its own matrix, stored, packed or in tiles. See product.h for how.

#include "product.h"

namespace polymoe {
namespace {

// Memory that is kept from call to call.
struct Workspace {
    Segments segments;
    Inputs inputs;
    std::vector<float> biases;
};

float widened(float value) { return value; }
float widened(uint16_t value) { return from_bf16(value); }

// bias(segment): its `out` values, or null for all.
template <class Value, class Bias>
void run(const Value* x, int64_t in, int64_t out, const Stack* bases, const Stack* deltas, const Bias& bias, int64_t bits,
         bool coarse, Value* y, Workspace& work, int num_threads) {
    auto& [segments, inputs, biases] = work;
    segments.end();
    const int64_t rows = segments.count();
    if (!rows) return;
    const int64_t count = static_cast<int64_t>(segments.rows.size());
    const bool has_bias = bias(0) != nullptr;
    if (has_bias && static_cast<int64_t>(biases.size()) < count * out) biases.resize(count * out);
    for (int64_t s = 0; has_bias && s < count; ++s)
        for (int64_t o = 0; o < out; ++o) biases[s * out + o] = widened(bias(s)[o]);
    inputs.fill(rows, in, bits, num_threads, [&](int64_t r) { return x + r * in; });
    Product<Value>{in, out, false, bases, deltas, inputs, has_bias ? biases.data() : nullptr, coarse, y}.run(segments, num_threads);
}

// Segments of the functions below that have ids of bases and deltas; empty ones are kept for their biases.
void describe(int64_t num_segments, const int64_t* starts, const int64_t* base, const int64_t* delta, const int64_t* sign,
              const Stack* bases, const Stack* deltas, Segments& segments) {
    segments.clear();
    for (int64_t g = 0; g < num_segments; ++g)
        segments.add(g == 0 || base[g - 1] != base[g],
                     {{find(bases, base[g]), find(deltas, delta[g]), sign && sign[g] < 0 ? -1.0f : 1.0f}, starts[g], starts[g + 1]});
}

}  // namespace
}  // namespace polymoe

// x [rows, in], y [rows, out]; group g has rows starts[g] .. starts[g + 1] and uses weight ids[g] of stack [*, out, in]
// and, unless bias is null, of bias [*, out].
extern "C" void polymoe_grouped_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_groups,
                                            const int64_t* ids, const int64_t* starts, const uint16_t* stack,
                                            const uint16_t* bias, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace work;
    Stack stored{};
    stored.kind = STORED, stored.count = INT64_MAX, stored.data = reinterpret_cast<const uint8_t*>(stack), stored.type = BF16;
    work.segments.clear();
    for (int64_t g = 0; g < num_groups; ++g) work.segments.add(true, {{{0, ids[g]}, {-1, 0}, 1}, starts[g], starts[g + 1]});
    run(x, in, out, &stored, nullptr, [&](int64_t g) { return bias ? bias + ids[g] * out : nullptr; }, 0, false, y, work, num_threads);
}

// Segment g has rows starts[g] .. starts[g + 1] of x [rows, in] and y [rows, out], base[g], delta[g] (-1: none) and
// sign[g]; neighbours on one base share it. bias [num_segments, out] or null.
extern "C" void polymoe_packed_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_segments,
                                           const int64_t* starts, const int64_t* base, const int64_t* delta,
                                           const int64_t* sign, const polymoe::Stack* bases, const polymoe::Stack* deltas,
                                           const uint16_t* bias, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace work;
    describe(num_segments, starts, base, delta, sign, bases, deltas, work.segments);
    run(x, in, out, bases, deltas, [&](int64_t g) { return bias ? bias + g * out : nullptr; }, 0, false, y, work, num_threads);
}

// The same in float32.
extern "C" void polymoe_packed_linear_f32(const float* x, int64_t in, int64_t out, int64_t num_segments,
                                          const int64_t* starts, const int64_t* base, const int64_t* delta,
                                          const int64_t* sign, const polymoe::Stack* bases, const polymoe::Stack* deltas,
                                          const float* bias, float* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace work;
    describe(num_segments, starts, base, delta, sign, bases, deltas, work.segments);
    run(x, in, out, bases, deltas, [&](int64_t g) { return bias ? bias + g * out : nullptr; }, 0, false, y, work, num_threads);
}

// The same in bfloat16 with pools in tiles, without signs and biases. bits: of activations, 8 or 16; coarse: deltas are
// multiplied by the first 8 bits only, where that saves time.
extern "C" void polymoe_tiled_linear_bf16(const uint16_t* x, int64_t in, int64_t out, int64_t num_segments,
                                          const int64_t* starts, const int64_t* base, const int64_t* delta,
                                          const polymoe::Stack* bases, const polymoe::Stack* deltas, int64_t bits,
                                          int64_t coarse, uint16_t* y, int num_threads) {
    using namespace polymoe;
    static thread_local Workspace work;
    describe(num_segments, starts, base, delta, nullptr, bases, deltas, work.segments);
    const auto no_bias = [](int64_t) -> const uint16_t* { return nullptr; };
    run(x, in, out, bases, deltas, no_bias, bits, coarse != 0, y, work, num_threads);
}
