// Every function of a compiled library against a plain loop in double precision, without Python: for processors that only
// an emulator has here. `make emulate-arm` runs it.
//
//     check_kernels LIBRARY        prints a line for each comparison that fails and how many there were; 1 if any failed

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <functional>
#include <random>

#include "pack_codes.h"
#include "stacks.h"
#include "tile_layout.h"

using namespace polymoe;
using std::vector;

namespace {

void* library;
std::mt19937 generator(1);
int comparisons = 0, failures = 0;

template <class Function>
Function* found(const char* name) {
    void* function = dlsym(library, name);
    if (!function) printf("%s is missing\n", name), exit(1);
    return reinterpret_cast<Function*>(function);
}

float wide(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t narrow(double number) {
    const float value = static_cast<float>(number);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

vector<uint16_t> random_bf16(int64_t count, double scale) {
    std::normal_distribution<double> normal(0, scale);
    vector<uint16_t> values(count);
    for (auto& value : values) value = narrow(normal(generator));
    return values;
}

int64_t below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(generator); }

// The norm of the difference over that of what is expected.
template <class Value>
void compare(const char* what, int64_t number, const vector<Value>& got, const vector<double>& expected, double most) {
    double apart = 0, size = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        double value;
        if constexpr (sizeof(Value) == 2) value = wide(got[i]);
        else value = got[i];
        apart += (value - expected[i]) * (value - expected[i]), size += expected[i] * expected[i];
    }
    ++comparisons;
    if (std::sqrt(apart / size) <= most) return;  // not for NaN
    ++failures;
    printf("%s %ld: off by %.2g, at most %.2g\n", what, static_cast<long>(number), std::sqrt(apart / size), most);
}

// `count` matrices [outputs, in] in one pool of the kernels, and what they stand for.
struct Pool {
    int64_t count, outputs, in;
    Stack stack{};
    vector<double> dense;
    vector<uint8_t> data, table;
    vector<uint16_t> scales, stored;
    vector<float> levels;
    vector<int64_t> starts;
    vector<int32_t> marks;

    double at(int64_t index, int64_t o, int64_t k) const { return dense[(index * outputs + o) * in + k]; }
};

Pool stored_pool(int64_t count, int64_t outputs, int64_t in) {
    Pool p{count, outputs, in};
    p.stored = random_bf16(count * outputs * in, 0.05);
    for (uint16_t value : p.stored) p.dense.push_back(wide(value));
    p.stack.kind = STORED, p.stack.count = count, p.stack.type = BF16;
    p.stack.data = reinterpret_cast<const uint8_t*>(p.stored.data());
    return p;
}

float e4m3(int64_t code) {
    const double fraction = static_cast<double>(code % 8) / 8;
    return static_cast<float>(code < 8 ? std::ldexp(fraction, -6) : std::ldexp(1 + fraction, static_cast<int>(code / 8) - 7));
}

// Random codes; in tiles where asked.
Pool packed_pool(int64_t kind, int64_t count, int64_t outputs, int64_t in, double scale, bool in_tiles) {
    Pool p{count, outputs, in};
    const int64_t bits = kind == FP8 ? 8 : kind, codes = 1 << bits, group = group_of(in), groups = (in + group - 1) / group;
    const int64_t row_bytes = kind == 3 ? (in * 2 + 7) / 8 + (in + 7) / 8 : kind == 5 ? (in + 1) / 2 + (in + 7) / 8
                            : kind == 6 ? (in + 1) / 2 + (in + 3) / 4 : (in * bits + 7) / 8;
    vector<int> bytes(codes);
    for (int64_t c = 0; c < codes; ++c) bytes[c] = kind == INT8 ? static_cast<int>(c) - 128 : static_cast<int>((2 * c + 1 - codes) * 127 / codes);
    for (int64_t i = 0; i < 256; ++i) p.table.push_back(static_cast<uint8_t>(bytes[i % codes] + 128));
    for (int64_t i = 0; i < 128; ++i) p.levels.push_back(kind == FP8 ? e4m3(i) : static_cast<float>(bytes[i % codes]) / 64);
    p.data.resize(count * outputs * row_bytes);
    p.scales = random_bf16(count * outputs * groups, kind == FP8 ? scale / 50 : scale);
    vector<uint8_t> row(in + 64);
    for (int64_t r = 0; r < count * outputs; ++r) {
        for (int64_t k = 0; k < in; ++k) {
            do row[k] = static_cast<uint8_t>(below(codes));
            while (kind == FP8 && row[k] % 128 == 127);  // NaN
            double level = kind == INT8 ? row[k] - 128.0 : p.levels[row[k] % 128];
            if (kind == FP8 && row[k] >= 128) level = -level;
            p.dense.push_back(level * wide(p.scales[r * groups + k / group]));
        }
        pack(row.data(), in, bits, p.data.data() + r * row_bytes);
    }
    p.stack.kind = kind, p.stack.count = count, p.stack.row_bytes = row_bytes, p.stack.group = group;
    if (in_tiles) {
        const auto make = found<void(const uint8_t*, const uint16_t*, int64_t, int64_t, int64_t, int64_t, uint8_t*, uint16_t*, int)>("polymoe_make_tiles");
        const vector<uint8_t> old = p.data;
        const vector<uint16_t> old_scales = p.scales;
        make(old.data(), old_scales.data(), bits, count * outputs, in, row_bytes, p.data.data(), p.scales.data(), 2);
        p.stack.step = kind == INT8 ? 1.0f : 1.0f / 64;
    }
    return p;
}

// Delta d changes a seventh of the values of entry d of `base`.
Pool exact_pool(const Pool& base) {
    Pool p{base.count, base.outputs, base.in};
    const int64_t row_bytes = (base.in + 7) / 8;
    p.data.resize(base.count * base.outputs * row_bytes);
    p.dense = base.dense;
    for (int64_t r = 0; r < base.count * base.outputs; ++r) {
        if (r % base.outputs == 0) p.starts.push_back(static_cast<int64_t>(p.stored.size()));
        if (r % base.outputs % MARK_ROWS == 0) p.marks.push_back(static_cast<int32_t>(static_cast<int64_t>(p.stored.size()) - p.starts.back()));
        for (int64_t k = 0; k < base.in; ++k) {
            if (below(7)) continue;
            p.data[r * row_bytes + k / 8] |= static_cast<uint8_t>(1 << k % 8);
            p.stored.push_back(narrow(0.1 * static_cast<double>(below(9) - 4)));
            p.dense[r * base.in + k] = wide(p.stored.back());
        }
    }
    p.stack.kind = EXACT, p.stack.count = base.count, p.stack.row_bytes = row_bytes, p.stack.type = BF16;
    p.stack.num_marks = (base.outputs + MARK_ROWS - 1) / MARK_ROWS;
    return p;
}

// The stack with addresses of where the pool is now.
Stack told(const Pool& p, bool in_tiles) {
    Stack s = p.stack;
    if (s.kind == STORED) return s;
    s.data = p.data.data(), s.scales = p.scales.data(), s.levels = p.levels.data(), s.values = p.stored.data();
    s.starts = p.starts.data(), s.marks = p.marks.data(), s.table = in_tiles ? p.table.data() : nullptr;
    return s;
}

// What a base and a delta make of an input: `exact` deltas replace.
double weight(const Pool& bases, const Pool* deltas, int64_t base, int64_t delta, int64_t sign, int64_t o, int64_t k) {
    if (!deltas || delta < 0) return bases.at(base, o, k);
    return deltas->stack.kind == EXACT ? deltas->at(delta, o, k) : bases.at(base, o, k) + sign * deltas->at(delta, o, k);
}

void linear_stored(int64_t rows, int64_t in, int64_t out) {
    const Pool p = stored_pool(3, out, in);
    const vector<uint16_t> x = random_bf16(rows * in, 1), bias = random_bf16(3 * out, 1);
    const vector<int64_t> ids{2, 0, 1}, starts{0, rows / 3, rows / 3, rows};
    vector<uint16_t> y(rows * out);
    found<void(const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const uint16_t*, const uint16_t*, uint16_t*, int)>(
        "polymoe_grouped_linear_bf16")(x.data(), in, out, 3, ids.data(), starts.data(), p.stored.data(), bias.data(), y.data(), 2);
    vector<double> expected(rows * out);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < out; ++o) {
            const int64_t id = r < rows / 3 ? 2 : 1;
            double sum = wide(bias[id * out + o]);
            for (int64_t k = 0; k < in; ++k) sum += p.at(id, o, k) * wide(x[r * in + k]);
            expected[r * out + o] = sum;
        }
    compare("grouped_linear", rows, y, expected, 0.004);
}

// One product of three segments on two bases; in float32, or in tiles.
template <class Value>
void linear_packed(const char* name, const Pool& bases, const Pool* deltas, int64_t rows, int64_t bits) {
    const int64_t in = bases.in, out = bases.outputs;
    const vector<uint16_t> rounded = random_bf16(rows * in, 1);
    vector<Value> x, y(rows * out);
    for (uint16_t value : rounded)
        if constexpr (sizeof(Value) == 2) x.push_back(value);
        else x.push_back(wide(value));
    const vector<int64_t> starts{0, rows / 4, rows / 2, rows}, base{0, 0, 1}, delta{0, deltas ? -1 : -1, 1}, none{-1, -1, -1};
    const vector<int64_t> sign{1, 1, bits || (deltas && deltas->stack.kind == EXACT) ? 1 : -1};
    const Stack of_bases = told(bases, bits > 0), of_deltas = deltas ? told(*deltas, bits > 0) : Stack{};
    const int64_t* ids = deltas ? delta.data() : none.data();
    if (bits)
        found<void(const Value*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, const Stack*, const Stack*, int64_t, int64_t, Value*, int)>(
            name)(x.data(), in, out, 3, starts.data(), base.data(), ids, &of_bases, &of_deltas, bits, 0, y.data(), 2);
    else
        found<void(const Value*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, const int64_t*, const Stack*, const Stack*, const Value*, Value*, int)>(
            name)(x.data(), in, out, 3, starts.data(), base.data(), ids, sign.data(), &of_bases, &of_deltas, nullptr, y.data(), 2);
    vector<double> expected(rows * out);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t s = r < rows / 4 ? 0 : r < rows / 2 ? 1 : 2;
        for (int64_t o = 0; o < out; ++o)
            for (int64_t k = 0; k < in; ++k) expected[r * out + o] += weight(bases, deltas, base[s], ids[s], sign[s], o, k) * wide(rounded[r * in + k]);
    }
    compare(name, bases.stack.kind * 100 + (deltas ? deltas->stack.kind : 99), y, expected, sizeof(Value) == 4 ? 2e-6 : bits == 8 ? 0.02 : 0.004);
}

// A whole layer. up_bits, down_bits 0: not in tiles; kind STORED without deltas: by polymoe_experts_bf16.
void experts(int64_t kind, int64_t delta_kind, int64_t tokens, int64_t up_bits, int64_t down_bits) {
    constexpr int64_t WIDTH = 192, INNER = 352, EXPERTS = 3, TOP_K = 2;
    const bool in_tiles = up_bits > 0;
    const auto make = [&](int64_t outputs, int64_t in, int64_t its, double scale) {
        return its == STORED ? stored_pool(EXPERTS, outputs, in) : packed_pool(its, EXPERTS, outputs, in, scale, in_tiles);
    };
    const Pool up = make(2 * INNER, WIDTH, kind, 0.05), down = make(WIDTH, INNER, kind, 0.05);
    Pool up_delta, down_delta;
    if (delta_kind == EXACT) up_delta = exact_pool(up), down_delta = exact_pool(down);
    else if (delta_kind > 0) up_delta = make(2 * INNER, WIDTH, delta_kind, 0.01), down_delta = make(WIDTH, INNER, delta_kind, 0.01);
    const bool has_deltas = delta_kind >= 0;
    const vector<uint16_t> hidden = random_bf16(tokens * WIDTH, 1), absent = random_bf16(tokens * TOP_K * WIDTH, 1);
    vector<int32_t> base, delta;
    vector<int8_t> sign;
    vector<float> gate;
    for (int64_t i = 0; i < tokens * TOP_K; ++i) {
        base.push_back(kind != STORED && below(6) == 0 ? -1 : static_cast<int32_t>(below(EXPERTS)));
        delta.push_back(base[i] < 0 || below(4) == 0 ? -1 : delta_kind == EXACT ? base[i] : static_cast<int32_t>(below(EXPERTS)));
        sign.push_back(delta_kind != EXACT && below(2) ? -1 : 1);
        gate.push_back(static_cast<float>(below(100)) / 100);
    }
    vector<uint16_t> y(tokens * WIDTH);
    const Stack ub = told(up, in_tiles), db = told(down, in_tiles), ud = has_deltas ? told(up_delta, in_tiles) : Stack{},
                dd = has_deltas ? told(down_delta, in_tiles) : Stack{};
    const int32_t* deltas = has_deltas ? delta.data() : nullptr;
    if (kind == STORED && !has_deltas)
        found<void(const uint16_t*, const int32_t*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const uint16_t*, const uint16_t*, uint16_t*, int)>(
            "polymoe_experts_bf16")(hidden.data(), base.data(), gate.data(), tokens, TOP_K, WIDTH, INNER, EXPERTS, up.stored.data(), down.stored.data(), y.data(), 2);
    else if (in_tiles)
        found<void(const uint16_t*, const int32_t*, const int32_t*, const int8_t*, const float*, int64_t, int64_t, int64_t, int64_t, const Stack*, const Stack*, const Stack*, const Stack*, int64_t, int64_t, const uint16_t*, uint16_t*, int)>(
            "polymoe_tiled_experts_bf16")(hidden.data(), base.data(), deltas, sign.data(), gate.data(), tokens, TOP_K, WIDTH, INNER, &ub, &ud, &db, &dd, up_bits, down_bits, absent.data(), y.data(), 2);
    else
        found<void(const uint16_t*, const int32_t*, const int32_t*, const int8_t*, const float*, int64_t, int64_t, int64_t, int64_t, const Stack*, const Stack*, const Stack*, const Stack*, const uint16_t*, uint16_t*, int)>(
            "polymoe_packed_experts_bf16")(hidden.data(), base.data(), deltas, sign.data(), gate.data(), tokens, TOP_K, WIDTH, INNER, &ub, &ud, &db, &dd, absent.data(), y.data(), 2);
    vector<double> expected(tokens * WIDTH);
    int64_t num_absent = 0;
    for (int64_t i = 0; i < tokens * TOP_K; ++i) {
        double* to = expected.data() + i / TOP_K * WIDTH;
        if (base[i] < 0) {
            for (int64_t o = 0; o < WIDTH; ++o) to[o] += gate[i] * wide(absent[num_absent * WIDTH + o]);
            ++num_absent;
            continue;
        }
        const auto product = [&](const Pool& bases, const Pool& its, int64_t o, const std::function<double(int64_t)>& x) {
            double sum = 0;
            for (int64_t k = 0; k < bases.in; ++k) sum += weight(bases, has_deltas ? &its : nullptr, base[i], delta[i], sign[i], o, k) * x(k);
            return sum;
        };
        vector<double> active(INNER);
        const auto row = [&](int64_t k) { return wide(hidden[i / TOP_K * WIDTH + k]); };
        for (int64_t o = 0; o < INNER; ++o) {
            const double g = product(up, up_delta, o, row), u = product(up, up_delta, INNER + o, row);
            active[o] = g / (1 + std::exp(-g)) * u;
        }
        for (int64_t o = 0; o < WIDTH; ++o) to[o] += gate[i] * product(down, down_delta, o, [&](int64_t k) { return active[k]; });
    }
    compare(in_tiles ? "tiled_experts" : "packed_experts", kind * 100 + (has_deltas ? delta_kind : 99), y, expected, down_bits == 8 ? 0.03 : up_bits == 8 ? 0.02 : 0.01);
}

void norm_and_combine() {
    constexpr int64_t ROWS = 7, WIDTH = 208, REPEAT = 2;
    const vector<uint16_t> x = random_bf16(ROWS * WIDTH, 3), weights = random_bf16(2 * WIDTH, 1);
    const vector<int64_t> weight_of{1, 0, 1, 0};
    vector<uint16_t> y(ROWS * WIDTH);
    found<void(const uint16_t*, const uint16_t*, const int64_t*, int64_t, int64_t, int64_t, float, uint16_t*, int)>("polymoe_rms_norm_bf16")(
        x.data(), weights.data(), weight_of.data(), REPEAT, ROWS, WIDTH, 1e-5f, y.data(), 2);
    vector<double> expected;
    for (int64_t r = 0; r < ROWS; ++r) {
        double squares = 0;
        for (int64_t d = 0; d < WIDTH; ++d) squares += std::pow(wide(x[r * WIDTH + d]), 2);
        for (int64_t d = 0; d < WIDTH; ++d)
            expected.push_back(wide(weights[weight_of[r / REPEAT] * WIDTH + d]) * wide(narrow(wide(x[r * WIDTH + d]) / std::sqrt(squares / WIDTH + 1e-5))));
    }
    compare("rms_norm", 0, y, expected, 0.003);

    const vector<int64_t> place{3, 0, 2, 1, 5, 4};
    const vector<float> gate{0.5f, 0.25f, 1, 0, -1, 2};
    vector<uint16_t> sum(3 * WIDTH);
    found<void(const uint16_t*, const int64_t*, const float*, int64_t, int64_t, int64_t, uint16_t*, int)>("polymoe_combine_bf16")(
        x.data(), place.data(), gate.data(), 3, 2, WIDTH, sum.data(), 1);
    expected.assign(3 * WIDTH, 0);
    for (int64_t i = 0; i < 6; ++i)
        for (int64_t d = 0; d < WIDTH; ++d) expected[i / 2 * WIDTH + d] += gate[i] * wide(x[place[i] * WIDTH + d]);
    compare("combine", 0, sum, expected, 0.003);
}

void attention(int64_t heads, int64_t key_heads, int64_t key_dim, int64_t value_dim, int64_t window) {
    constexpr int64_t TOKENS = 3, BLOCK = 16, BLOCKS = 8;
    const vector<uint16_t> query = random_bf16(TOKENS * heads * key_dim, 1), key = random_bf16(BLOCKS * BLOCK * key_heads * key_dim, 1),
                           value = random_bf16(BLOCKS * BLOCK * key_heads * value_dim, 1);
    const vector<int64_t> table{5, 1, 0, 7, 2, 6, 3, 4}, sequence{0, 1, 1}, visible{33, 1, 60};
    vector<uint16_t> out(TOKENS * heads * value_dim);
    found<void(const uint16_t*, const uint16_t*, const uint16_t*, const int64_t*, int64_t, const int64_t*, const int64_t*, const int64_t*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, uint16_t*, int)>(
        "polymoe_paged_attention_bf16")(query.data(), key.data(), value.data(), table.data(), 4, sequence.data(), visible.data(), nullptr, nullptr, 0, window, TOKENS, heads, key_heads, key_dim, value_dim, BLOCK, 0.2f, out.data(), 2);
    vector<double> expected(out.size());
    for (int64_t n = 0; n < TOKENS; ++n)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t first = window ? std::max<int64_t>(0, visible[n] - window) : 0, of = h / (heads / key_heads);
            double total = 0;
            double* to = expected.data() + (n * heads + h) * value_dim;
            for (int64_t t = first; t < visible[n]; ++t) {
                const int64_t slot = table[sequence[n] * 4 + t / BLOCK] * BLOCK + t % BLOCK;
                double score = 0;
                for (int64_t d = 0; d < key_dim; ++d) score += wide(query[(n * heads + h) * key_dim + d]) * wide(key[(slot * key_heads + of) * key_dim + d]);
                total += std::exp(0.2 * score);
                for (int64_t d = 0; d < value_dim; ++d) to[d] += std::exp(0.2 * score) * wide(value[(slot * key_heads + of) * value_dim + d]);
            }
            for (int64_t d = 0; d < value_dim; ++d) to[d] /= total;
        }
    compare("paged_attention", heads, out, expected, 0.004);
}

// Each code is of the level nearest to the value over its scale.
void encode(int64_t bits) {
    constexpr int64_t ROWS = 5, IN = 320, RESOLUTION = 64;
    const int64_t codes = 1 << bits, group = group_of(IN), groups = (IN + group - 1) / group, row_bytes = (IN * bits + 7) / 8;
    vector<float> weight, levels;
    for (uint16_t value : random_bf16(ROWS * IN, 0.3)) weight.push_back(wide(value));
    for (int64_t c = 0; c < codes; ++c) levels.push_back(bits == 8 ? static_cast<float>(c - 128) : static_cast<float>(2 * c + 1 - codes) * 2.5f / static_cast<float>(codes));
    const float limit = 4;
    vector<int32_t> search;
    for (int64_t i = 0; i <= 2 * limit * RESOLUTION; ++i) {
        const float value = (static_cast<float>(i) + 0.5f) / RESOLUTION - limit;
        search.push_back(static_cast<int32_t>(std::clamp<float>(std::round((value / 2.5f * static_cast<float>(codes) - 1 + static_cast<float>(codes)) / 2), 0, static_cast<float>(codes - 1))));
    }
    vector<uint8_t> packed(ROWS * row_bytes);
    vector<uint16_t> scales(ROWS * groups);
    found<void(const float*, int64_t, int64_t, int64_t, int64_t, const float*, const int32_t*, float, float, uint8_t*, int64_t, uint16_t*, int)>("polymoe_encode_f32")(
        weight.data(), ROWS, IN, group, bits, levels.data(), search.data(), limit, RESOLUTION, packed.data(), row_bytes, scales.data(), 2);
    vector<uint8_t> row(IN + 64), expected(row_bytes);
    int64_t differing = 0;
    for (int64_t r = 0; r < ROWS; ++r) {
        for (int64_t k = 0; k < IN; ++k) {
            const float ratio = weight[r * IN + k] / wide(scales[r * groups + k / group]);
            int64_t best = 0;
            for (int64_t c = 1; c < codes; ++c)
                if (std::abs(levels[c] - ratio) < std::abs(levels[best] - ratio) && !(bits == 8 && c == 0)) best = c;
            row[k] = static_cast<uint8_t>(best);
        }
        pack(row.data(), IN, bits, expected.data());
        for (int64_t i = 0; i < row_bytes; ++i) differing += packed[r * row_bytes + i] != expected[i];
    }
    ++comparisons;
    if (differing <= ROWS * row_bytes / 20) return;  // the search has steps, at the middle of two levels either is nearest
    ++failures;
    printf("encode %ld: %ld of %ld bytes differ\n", static_cast<long>(bits), static_cast<long>(differing), static_cast<long>(ROWS * row_bytes));
}

}  // namespace

int main(int, char** arguments) {
    library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return printf("%s\n", dlerror()), 1;
    found<const char*()>("polymoe_sources");
    found<int()>("polymoe_amx")();
    found<void(int64_t)>("polymoe_spin")(50);
    for (int64_t rows : {1, 3, 9}) linear_stored(rows, 96, 45);
    for (int64_t kind : {1, 2, 3, 4, 5, 6, 8, 9}) {
        const Pool odd = packed_pool(kind, 2, 19, 301, 0.05, false), odd_delta = packed_pool(2, 2, 19, 301, 0.01, false);
        linear_packed<float>("polymoe_packed_linear_f32", odd, nullptr, 5, 0);
        linear_packed<float>("polymoe_packed_linear_f32", odd, &odd_delta, 9, 0);
        const Pool even = packed_pool(kind, 2, 64, 320, 0.05, false), even_delta = packed_pool(3, 2, 64, 320, 0.01, false);
        linear_packed<uint16_t>("polymoe_packed_linear_bf16", even, &even_delta, 12, 0);
        experts(kind, 1, 7, 0, 0);
        if (kind == FP8) continue;
        const Pool tiled = packed_pool(kind, 2, 64, 320, 0.05, true), tiled_delta = packed_pool(2, 2, 64, 320, 0.01, true);
        for (int64_t bits : {8, 16}) linear_packed<uint16_t>("polymoe_tiled_linear_bf16", tiled, &tiled_delta, 12, bits);
        experts(kind, 5, 1, 16, 16);
        experts(kind, 1, 9, 8, 8);
        experts(kind, 3, 40, 8, 16);
    }
    const Pool base = stored_pool(2, 33, 200), own = exact_pool(base);
    linear_packed<float>("polymoe_packed_linear_f32", base, &own, 8, 0);
    for (int64_t delta : {-1, 0, 2}) experts(STORED, delta, 11, 0, 0);
    norm_and_combine();
    for (int64_t window : {0, 7}) attention(4, 4, 32, 32, window), attention(6, 2, 96, 48, window), attention(10, 2, 64, 64, window);
    for (int64_t bits : {1, 2, 4, 8}) encode(bits);
    printf("%d comparisons, %d failed\n", comparisons, failures);
    return failures ? 1 : 0;
}
