// Products with packed experts in float32, for any sizes: y_r = (base + sign · delta) x_r + b, nothing rounded between.
// What float32 and float16 are computed by, and bfloat16 of sizes that packed_experts.cpp does not know.
//
// A piece of work is a group (all segments on a base) and ROWS rows of its weight: the base's are decoded once, each delta
// is added to them once for its own segment. Values lie in steps of 32, those at even places before those at odd ones, as
// decoding gives them (packed_codes.h), in the weights and in x alike; what is missing of the last step is zero in x.

#include <string.h>

#include <algorithm>
#include <vector>

#include "packed_codes.h"
#include "threads.h"

namespace polymoe {
namespace {

constexpr int64_t ROWS = 16;     // of a piece: 16 x 1024 float32 are 64 KiB, base and own stay in L2
constexpr int64_t SUB_ROWS = 4;  // decoded at once for few rows of x: 16 KiB stay in L1
constexpr int64_t FEW = 8;

inline __mmask16 lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// 32 values in order -> those at even places, those at odd ones.
inline Floats apart(__m512 first, __m512 second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)};
}

inline int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

// The values that `valid` names, one after the other from `from` on, at the first lanes.
inline __m512 load_values(int64_t type, const uint8_t* from, __mmask16 valid) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(valid, from);
    const __m256i half = _mm256_maskz_loadu_epi16(valid, from);
    if (type == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

struct FloatProduct {
    int64_t in, out, stride;  // stride: of a row of values, whole steps
    const Stack *bases, *deltas;
    const std::vector<Segment>& segments;
    const int64_t* starts;
    const float *x, *bias;  // x [rows, stride]
    float* y;
    const Tail& tail;

    // Weight rows o .. o + count of a segment's base -> [count, stride].
    void base(const Segment& s, int64_t o, int64_t count, float* to) const {
        const Stack& stack = bases[s.base.stack];
        if (stack.kind == STORED) {
            const int64_t size = size_of(stack.type);
            const uint8_t* row = stack.data + (s.base.index * out + o) * in * size;
            for (int64_t r = 0; r < count; ++r, row += in * size, to += stride)
                for (int64_t k = 0; k < in; k += 32)
                    apart(load_values(stack.type, row + k * size, lanes(in - k)),
                          load_values(stack.type, row + (k + 16) * size, lanes(in - k - 16))).store(to + k);
            return;
        }
        decode(stack, s.base.index, o, count, 1, [to](int64_t at, const Floats& values) { values.store(to + at); });
    }

    // base + sign · delta, or what a lossless delta makes of the base. base and `to`: [count, stride].
    void own(const Segment& s, int64_t o, int64_t count, const float* base, float* to) const {
        const Stack& stack = deltas[s.delta.stack];
        if (stack.kind == EXACT) return replace(stack, s.delta.index, o, count, base, to);
        decode(stack, s.delta.index, o, count, s.sign, [base, to](int64_t at, const Floats& values) {
            (values + Floats::load(base + at)).store(to + at);
        });
    }

private:
    template <class Put>
    void decode(const Stack& s, int64_t index, int64_t o, int64_t count, float sign, Put put) const {
        const int64_t groups = (in + s.group - 1) / s.group;
        with_kind(s.kind, [&](auto kind) {
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = index * out + o + r;
                decode_row<decltype(kind)::value>(
                    s, tail, s.data + row * s.row_bytes, s.scales + row * groups, in, sign, count * s.row_bytes,
                    [&](int64_t k, const auto& values, __m512i codes) { put(r * stride + k, values.floats(codes)); });
            }
        });
    }

    void replace(const Stack& s, int64_t index, int64_t first, int64_t count, const float* base, float* to) const {
        const uint8_t* bitmap = s.data + index * out * s.row_bytes;
        const int64_t mark = first / MARK_ROWS, size = size_of(s.type);
        int64_t before = s.starts[index] + s.marks[index * s.num_marks + mark];
        before += count_bits(bitmap + mark * MARK_ROWS * s.row_bytes, first % MARK_ROWS * s.row_bytes);
        const uint8_t* values = reinterpret_cast<const uint8_t*>(s.values) + before * size;
        for (int64_t r = first; r < first + count; ++r, base += stride, to += stride)
            for (int64_t k = 0; k < in; k += 32) {
                uint32_t bits = 0;
                memcpy(&bits, bitmap + r * s.row_bytes + k / 8, std::min<int64_t>(4, s.row_bytes - k / 8));
                __m512 changed[2], where[2];
                for (int half = 0; half < 2; ++half) {
                    const __mmask16 mask = static_cast<__mmask16>(bits >> (16 * half));
                    const int number = __builtin_popcount(mask);
                    changed[half] = _mm512_maskz_expand_ps(mask, load_values(s.type, values, lanes(number)));
                    where[half] = _mm512_maskz_mov_ps(mask, _mm512_set1_ps(1));
                    values += number * size;
                }
                const Floats own = apart(changed[0], changed[1]), is_own = apart(where[0], where[1]), old = Floats::load(base + k);
                const __mmask16 even = _mm512_cmp_ps_mask(is_own.even, _mm512_setzero_ps(), _CMP_NEQ_OQ);
                const __mmask16 odd = _mm512_cmp_ps_mask(is_own.odd, _mm512_setzero_ps(), _CMP_NEQ_OQ);
                Floats{_mm512_mask_mov_ps(old.even, even, own.even), _mm512_mask_mov_ps(old.odd, odd, own.odd)}.store(to + k);
            }
    }
};

// MR rows of x against NR weight rows, `count` of which are there.
template <int MR, int NR>
void tile(const FloatProduct& p, int64_t r, const float* w, int64_t count, const float* bias, int64_t o) {
    static_assert(MR * NR <= 16, "one sum a lane at the end");
    const float *x[MR], *weight[NR];
    for (int i = 0; i < MR; ++i) x[i] = p.x + (r + i) * p.stride;
    for (int j = 0; j < NR; ++j) weight[j] = w + std::min<int64_t>(j, count - 1) * p.stride;
    __m512 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.stride; k += 16) {
        __m512 column[NR];
        for (int j = 0; j < NR; ++j) column[j] = _mm512_loadu_ps(weight[j] + k);
        for (int i = 0; i < MR; ++i) {
            const __m512 row = _mm512_loadu_ps(x[i] + k);
            for (int j = 0; j < NR; ++j) sum[i * NR + j] = _mm512_fmadd_ps(row, column[j], sum[i * NR + j]);
        }
    }
    alignas(64) float total[16];
    _mm512_store_ps(total, add_lanes(sum));
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < std::min<int64_t>(NR, count); ++j)
            p.y[(r + i) * p.out + o + j] = total[i * NR + j] + (bias ? bias[o + j] : 0);
}

template <int MR, int NR>
void tiles(const FloatProduct& p, int64_t r, const float* w, int64_t o, int64_t count, const float* bias) {
    for (int64_t j = 0; j < count; j += NR) tile<MR, NR>(p, r, w + j * p.stride, count - j, bias, o + j);
}

// Rows of segment g times `count` weight rows, outputs from o on.
void multiply(const FloatProduct& p, int64_t g, const float* w, int64_t o, int64_t count) {
    const float* bias = p.bias ? p.bias + g * p.out : nullptr;
    for (int64_t r = p.starts[g]; r < p.starts[g + 1];) {
        const int64_t left = p.starts[g + 1] - r;
        if (left >= 4) tiles<4, 4>(p, r, w, o, count, bias), r += 4;
        else if (left >= 2) tiles<2, 4>(p, r, w, o, count, bias), r += 2;
        else tiles<1, 4>(p, r, w, o, count, bias), r += 1;
    }
}

}  // namespace
}  // namespace polymoe

// As polymoe_packed_linear_bf16, with float32 x, y and bias, and any `in` and `out`.
extern "C" void polymoe_packed_linear_f32(const float* x, int64_t in, int64_t out, int64_t num_segments,
                                          const int64_t* starts, const int64_t* base, const int64_t* delta,
                                          const int64_t* sign, const polymoe::Stack* bases, const polymoe::Stack* deltas,
                                          const float* bias, float* y, int num_threads) {
    using namespace polymoe;
    static thread_local std::vector<float> steps;
    static thread_local std::vector<int64_t> kept_groups;
    static thread_local std::vector<Segment> kept_segments;
    auto& groups = kept_groups;  // helpers see the caller's
    auto& segments = kept_segments;
    const int64_t stride = (in + 31) / 32 * 32, rows = starts[num_segments];
    if (static_cast<int64_t>(steps.size()) < rows * stride) steps.resize(rows * stride);
    segments.clear();
    groups.clear();
    for (int64_t g = 0; g < num_segments; ++g) {
        if (g == 0 || base[g - 1] != base[g]) groups.push_back(g);
        segments.push_back({find(bases, base[g]), find(deltas, delta[g]), sign[g] < 0 ? -1.0f : 1.0f});
    }
    groups.push_back(num_segments);
    float* const to = steps.data();
    parallel_for(rows, 8, num_threads, [&, to](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t k = 0; k < in; k += 32) {
                const float* from = x + r * in + k;
                apart(_mm512_maskz_loadu_ps(lanes(in - k), from), _mm512_maskz_loadu_ps(lanes(in - k - 16), from + 16))
                    .store(to + r * stride + k);
            }
    });
    const Tail tail(in);
    const FloatProduct p{in, out, stride, bases, deltas, segments, starts, to, bias, y, tail};
    const int64_t pieces = (out + ROWS - 1) / ROWS, num_groups = static_cast<int64_t>(groups.size()) - 1;
    parallel_for(num_groups * pieces, 2, num_threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<float> shared, its_own;
        shared.resize(ROWS * stride);
        its_own.resize(ROWS * stride);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t first = groups[piece / pieces], last = groups[piece / pieces + 1], o = piece % pieces * ROWS;
            int64_t most = 0;
            for (int64_t g = first; g < last; ++g) most = std::max(most, starts[g + 1] - starts[g]);
            const int64_t step = most <= FEW ? SUB_ROWS : ROWS, end_of_piece = std::min(o + ROWS, out);
            for (int64_t at = o; at < end_of_piece; at += step) {
                const int64_t count = std::min(step, end_of_piece - at);
                p.base(segments[first], at, count, shared.data());
                for (int64_t g = first; g < last; ++g) {
                    const bool alone = segments[g].delta.stack < 0;
                    // The last to use the base may overwrite it.
                    float* const weights = alone || g + 1 == last ? shared.data() : its_own.data();
                    if (!alone) p.own(segments[g], at, count, shared.data(), weights);
                    multiply(p, g, weights, at, count);
                }
            }
        }
    });
}
