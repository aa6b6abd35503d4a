// Feeds random weights, sound and damaged, to all that takes a file's arrays: `fuzz_pack [runs] [first]`; or so many
// damaged copies of sound ones, each damaged anew, to the checks above all: `fuzz_pack mutate [mutations]`.
//
// A sound one must come out as an independent reading of docs/format-spec.md says, bit for bit by `rows` and
// column by column by `linear`; a damaged one must be refused by std::invalid_argument or be sound after all.
// Weights are numbered; each is the same in every run, at the level that its number names. Each array stands
// alone on the heap, so that the address sanitizer sees any read beyond it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz_weights.h"
#include "linear.h"

namespace bitmosaic {
namespace {

long number;  // of the weight in work

[[noreturn]] void fail(const char* what, size_t row, size_t column, double wanted, double got) {
    std::fprintf(stderr, "weight %ld: %s at row %zu, column %zu: %.9g in place of %.9g\n", number, what, row,
                 column, got, wanted);
    std::exit(1);
}

// What `rows` says of every row, bit for bit where the code has a meaning.
void check_rows(const Matrix& m, const std::vector<float>& matrix) {
    std::vector<int64_t> all(m.out);
    std::iota(all.begin(), all.end(), 0);
    std::vector<float> got(size_t{m.out} * m.in);
    rows(m, all.data(), m.out, Scalar::f32, got.data(), 1);
    for (size_t i = 0; i < got.size(); ++i)
        if (!std::isnan(matrix[i]) && bits_of_float(got[i]) != bits_of_float(matrix[i]))
            fail("rows", i / m.in, i % m.in, matrix[i], got[i]);
}

// A single 1 among the activations picks a column, to the rounding of two products and a sum. An outlier is
// the sum of its delta and of a code that is no larger than the one it replaces.
void check_columns(Random& random, const Matrix& m, const Sound& sound) {
    std::vector<float> x(m.in), y(m.out);
    const auto picked = static_cast<uint32_t>(random.from(0, m.in - 1));
    x[picked] = 1;
    linear(m, x.data(), Scalar::f32, 1, nullptr, y.data(), Pass::exact, 1);
    if (m.rule.scale > 0) return;  // of x not much may be left
    for (uint32_t row = 0; row < m.out; ++row) {
        const float* wanted = sound.matrix.data() + size_t{row} * m.in;
        const float* decoded = sound.decoded.data() + size_t{row} * m.in;
        float largest = 0;
        for (uint32_t column = 0; column < m.in; ++column)
            largest += std::fabs(wanted[column]) + std::fabs(decoded[column]);
        if (!(largest < 1e20f)) continue;  // NaN times 0 reaches every sum of the row
        if (!(std::fabs(y[row] - wanted[picked]) <= 1e-6f * largest + 1e-37f))
            fail("linear", row, picked, wanted[picked], y[row]);
    }
}

// Whatever was packed can be used.
void use(Random& random, const Matrix& m) {
    if (uint64_t{m.out} * m.in > 1 << 20) return;
    const int64_t tokens = random.pick<int64_t>({1, 2, 5});
    std::vector<float> x(tokens * m.in), y(tokens * m.out);
    for (float& each : x) each = static_cast<float>(random.from(-1000, 1000)) / 300;
    linear(m, x.data(), Scalar::f32, tokens, nullptr, y.data(), Pass::integer, 1);
    linear(m, x.data(), Scalar::f32, tokens, nullptr, y.data(), Pass::exact, 1);
    const int64_t last = m.out - 1;
    rows(m, &last, 1, Scalar::f32, x.data(), 1);
}

struct Tally {
    int packed, refused, objected;
};

void run(Random& random, Tally& tally) {
    Sound sound = random_weight(random);
    const int damages = random.one_in(2) ? 0 : static_cast<int>(random.from(1, 3));
    for (int i = 0; i < damages; ++i) damage(random, sound.weight);
    try {
        if (!objection(sound.weight.tensor).empty()) return void(++tally.objected);
        const size_t planned = planned_bytes(sound.weight.tensor);
        const auto storage = pack(sound.weight.tensor, static_cast<int>(random.from(1, 2)));
        if (storage->bytes() != planned) fail("bytes", 0, 0, double(planned), double(storage->bytes()));
        ++tally.packed;
        use(random, storage->matrix());
        if (damages) return;
        check_rows(storage->matrix(), sound.matrix);
        check_columns(random, storage->matrix(), sound);
    } catch (const std::invalid_argument& error) {
        ++tally.refused;
        if (damages) return;
        std::fprintf(stderr, "weight %ld is sound and was refused: %s\n", number, error.what());
        std::exit(1);
    }
}

constexpr int kCopies = 50;     // damaged ones of each sound weight
constexpr int kPackedOfCopies = 16;  // one in so many that passed the checks is packed and used

// Damages a sound weight once to three times, and sees that it is refused or that all of it can be used.
void mutate(Random& random, const Sound& sound, Tally& tally) {
    Weight copy = sound.weight;
    copy.point();
    for (int64_t damages = random.pick<int64_t>({1, 1, 2, 3}); damages; --damages) damage(random, copy);
    try {
        if (!objection(copy.tensor).empty()) return void(++tally.objected);
        const size_t planned = planned_bytes(copy.tensor);
        ++tally.packed;
        if (!random.one_in(kPackedOfCopies)) return;
        const auto storage = pack(copy.tensor, 1);
        if (storage->bytes() != planned) fail("bytes", 0, 0, double(planned), double(storage->bytes()));
        use(random, storage->matrix());
    } catch (const std::invalid_argument&) {
        ++tally.refused;
    }
}

void mutate_all(long mutations) {
    const std::vector<std::string> levels = level_names();
    Tally tally{};
    for (long done = 0; done < mutations; ++number) {
        Random random{std::mt19937_64(static_cast<uint64_t>(number))};
        use_level(levels[number % levels.size()]);
        const Sound sound = random_weight(random);
        for (int i = 0; i < kCopies && done < mutations; ++i, ++done) mutate(random, sound, tally);
    }
    std::printf("%ld mutations: %d packed, %d refused, %d objected to\n", mutations, tally.packed, tally.refused,
                tally.objected);
}

}  // namespace
}  // namespace bitmosaic

int main(int count, char** arguments) {
    if (count > 1 && !std::strcmp(arguments[1], "mutate")) {
        bitmosaic::mutate_all(count > 2 ? std::atol(arguments[2]) : 1000000);
        return 0;
    }
    const long runs = count > 1 ? std::atol(arguments[1]) : 10000;
    const long first = count > 2 ? std::atol(arguments[2]) : 0;
    const std::vector<std::string> levels = bitmosaic::level_names();
    bitmosaic::Tally tally{};
    for (bitmosaic::number = first; bitmosaic::number < first + runs; ++bitmosaic::number) {
        bitmosaic::Random random{std::mt19937_64(static_cast<uint64_t>(bitmosaic::number))};
        bitmosaic::use_level(levels[bitmosaic::number % levels.size()]);
        bitmosaic::run(random, tally);
    }
    const auto [packed, refused, objected] = tally;
    std::printf("%ld runs: %d packed, %d refused, %d objected to\n", runs, packed, refused, objected);
}
