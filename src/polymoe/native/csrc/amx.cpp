// Whether products run on AMX: asked of the processor and the system, then tried, once a process.

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cmath>

#include "linear.h"
#include "tiles.h"

namespace polymoe::amx {
namespace {

constexpr int64_t FEW_ROWS = 32;  // without AMX (measured on Zen 4)

struct Choice {
    int products = 0;
    int64_t few_rows = FEW_ROWS;
};

#ifdef POLYMOE_EMULATE_AMX

Choice choose() { return {BF16 | INT8, 8}; }

#else

// Whether the processor has AMX with both kinds of products, and the system lets this process have its tiles.
bool is_offered() {
    constexpr unsigned BF16_TILE_INT8 = 1u << 22 | 1u << 24 | 1u << 25, OSXSAVE = 1u << 27;
    constexpr unsigned TILE_STATE = 1u << 17 | 1u << 18;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & BF16_TILE_INT8) != BF16_TILE_INT8) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Seconds of the fastest of several calls.
template <class Work>
double seconds(const Work& work) {
    double best = 1;
    for (int turn = 0; turn < 8; ++turn) {
        const auto start = std::chrono::steady_clock::now();
        for (int call = 0; call < 4; ++call) work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 4);
    }
    return best;
}

// Whether two ways came to the same sums, but for rounding: what is faster and wrong is not chosen.
bool agree(const std::vector<float>& a, const std::vector<float>& b) {
    float most = 0, apart = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        most = std::max(most, std::abs(a[i]));
        apart = std::max(apart, std::abs(a[i] - b[i]));
    }
    return apart <= most / 64;  // false for NaN
}

std::vector<float> as_floats(std::vector<uint16_t>& bf16) {
    std::vector<float> found(bf16.size());
    for (size_t i = 0; i < bf16.size(); ++i) {
        const uint32_t bits = static_cast<uint32_t>(bf16[i]) << 16;
        memcpy(&found[i], &bits, sizeof bits);
        bf16[i] = 0;
    }
    return found;
}

uint16_t quarter_steps(int64_t i, int64_t period) {  // of -1.5 … 1.5, exact in bfloat16
    const float value = static_cast<float>(i % period % 13 - 6) / 4;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

// A piece of a layer's size on both ways.
Choice choose() {
    if (!is_offered()) return {};
    constexpr int64_t IN = 1024, ROWS_TRIED = 96, FEW = 8;
    std::vector<uint16_t> x(ROWS_TRIED * IN, 0x3f80), weights(WEIGHT_ROWS * IN, 0x3f80), y(ROWS_TRIED * WEIGHT_ROWS);
    for (size_t i = 0; i < x.size(); ++i) x[i] = quarter_steps(i, 1021);
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = quarter_steps(i, 769);
    std::vector<uint32_t> room;
    uint32_t* packed = aligned(room, IN / 2 * WEIGHT_ROWS);
    const uint16_t* const matrix = weights.data();
    const int64_t starts[] = {0, FEW};
    const Problem p{x.data(), nullptr, IN, WEIGHT_ROWS, 1, starts, &matrix, nullptr, false, y.data()};
    const auto* pairs = reinterpret_cast<const uint32_t*>(x.data());
    const auto pack = [&] { pack_piece(p, matrix, nullptr, WEIGHT_ROWS, packed); };
    pack();

    Choice choice;
    configure();
    const double vectors = seconds([&] {
        for (int64_t r = 0; r < ROWS_TRIED; r += TILE)
            matmul_tile<TILE>(p, {r, TILE, TILE}, pairs + r * IN / 2, packed, nullptr, 0, WEIGHT_ROWS);
    });
    const std::vector<float> by_vectors = as_floats(y);
    const double tiles = seconds([&] {
        for (int64_t r = 0; r < ROWS_TRIED; r += AMX_TILE)
            amx_tile<true>(p, {r, AMX_TILE, AMX_TILE}, pairs + r * IN / 2, packed, nullptr, 0, WEIGHT_ROWS);
    });
    if (tiles < vectors && agree(by_vectors, as_floats(y))) {
        choice.products |= BF16;
        const double a_row = seconds([&] { dots<false>(p, 0, 0, WEIGHT_ROWS); }) / FEW;
        const double tile = seconds([&] { pack(), amx_tile<false>(p, {0, ROWS, ROWS}, pairs, packed, nullptr, 0, WEIGHT_ROWS); });
        choice.few_rows = std::clamp<int64_t>(static_cast<int64_t>(tile / a_row), 4, FEW_ROWS);
    }
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        std::vector<int8_t> high((ROWS + FEW) * IN);
        for (size_t i = 0; i < high.size(); ++i) high[i] = static_cast<int8_t>(i % 11) - 5;
        const std::vector<float> scales(ROWS * IN / MOST_GROUP, 1);
        const std::vector<int32_t> sums(2 * ROWS * IN / MOST_GROUP, 1);
        const Rounded rounded{high.data(), nullptr, scales.data(), sums.data(), IN, IN / MOST_GROUP};
        alignas(64) uint8_t bytes[MOST_GROUP * LANES];
        for (int64_t i = 0; i < MOST_GROUP * LANES; ++i) bytes[i] = static_cast<uint8_t>(i % 17);
        std::vector<float> out(ROWS * LANES);
        const auto vector_way = [&] { block_rows<FEW, false>(bytes, MOST_GROUP / 4, rounded, 0, 0, _mm512_set1_ps(1), out.data(), LANES); };
        const auto tile_way = [&] { amx_rows<false>(bytes, MOST_GROUP / 4, rounded, 0, 0, FEW, _mm512_set1_ps(1), out.data(), LANES); };
        vector_way();
        std::vector<float> sums_of_vectors(ROWS * LANES);
        sums_of_vectors.swap(out);
        tile_way();
        const bool same = agree(sums_of_vectors, out);
        if (same && seconds(tile_way) < seconds(vector_way)) choice.products |= INT8;
    }
    release();
    return choice;
}

#endif

const Choice& choice() {
    static const Choice made = [] {
        const char* level = getenv("POLYMOE_CPU_LEVEL");
        return level && strcmp(level, "amx") != 0 ? Choice{} : choose();
    }();
    return made;
}

}  // namespace

int chosen() { return choice().products; }

int64_t few_rows() { return choice().few_rows; }

}  // namespace polymoe::amx

extern "C" int polymoe_amx() { return polymoe::amx::chosen(); }
