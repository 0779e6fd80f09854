// A router in bfloat16: logits by each token's own weights, softmax in float32, the best experts. See router.py; no vectors
// here, so every instruction set's product is called.

#include <math.h>

#include <algorithm>
#include <vector>

#include "scalars.h"
#include "threads.h"

extern "C" void polymoe_grouped_linear_bf16(const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*,
                                            const uint16_t*, const uint16_t*, uint16_t*, int);

namespace {
constexpr int64_t OF_ALL = 0, OF_CHOSEN = 2;  // scorings; 1: of all, made to add up to 1
}

// x [tokens, in]; group g is rows starts[g] .. starts[g + 1] and uses ids[g] of stack [*, experts, in]; logits [tokens,
// experts]; scores and chosen [tokens, top_k], the largest first, of equal ones the one with the lower index. scoring: what
// the scores are of, see router.py.
extern "C" void polymoe_router_bf16(const uint16_t* x, int64_t in, int64_t experts, int64_t num_groups, const int64_t* ids,
                                    const int64_t* starts, const uint16_t* stack, int64_t top_k, int64_t scoring,
                                    uint16_t* logits, float* scores, int64_t* chosen, int num_threads) {
    polymoe_grouped_linear_bf16(x, in, experts, num_groups, ids, starts, stack, nullptr, logits, num_threads);
    const int64_t tokens = starts[num_groups];
    polymoe::parallel_for(tokens, std::max<int64_t>(1, 1024 / experts), num_threads, [&](int64_t first, int64_t last) {
        static thread_local std::vector<float> values;
        values.resize(experts);
        for (int64_t t = first; t < last; ++t) {
            float highest = -INFINITY, total = 0, kept = 0;
            for (int64_t e = 0; e < experts; ++e) highest = std::max(highest, polymoe::bf16_value(logits[t * experts + e]));
            for (int64_t e = 0; e < experts; ++e)
                total += values[e] = expf(polymoe::bf16_value(logits[t * experts + e]) - highest);
            float* its = scores + t * top_k;
            for (int64_t k = 0; k < top_k; ++k) {
                const int64_t best = std::max_element(values.begin(), values.end()) - values.begin();
                chosen[t * top_k + k] = best;
                kept += its[k] = scoring == OF_CHOSEN ? values[best] : values[best] / total;
                values[best] = -1;
            }
            for (int64_t k = 0; scoring != OF_ALL && k < top_k; ++k) its[k] /= kept;
        }
    });
}
