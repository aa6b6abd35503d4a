#include "rounded.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "floats.h"
#include "pool.h"

namespace bitmosaic {
namespace {

struct Work {
    const Rounding& r;
    int64_t chunk;  // tokens
    std::atomic<int64_t> infinite{0}, clipped{0};

    template <class Type>
    void token(int64_t t, Counts& counts) const {
        const auto* x = static_cast<const typename Type::Stored*>(r.x) + t * r.in;
        uint8_t* low = r.low + t * ((r.in + kStripTile - 1) / kStripTile);
        for (int64_t column = 0; column < r.in; column += kBlock, low += kBlock / kStripTile) {
            const int columns = static_cast<int>(std::min<int64_t>(kBlock, r.in - column));
            alignas(64) float values[kBlock] = {};
            for (int i = 0; i < columns; ++i) {
                values[i] = Type::to_float(x[column + i]);
                counts.infinite += std::isinf(values[i]);
                counts.clipped += std::fabs(values[i] * r.rule.inverse) > 2688.0f;
            }
            level().round_tiles(r.rule, static_cast<size_t>(column), columns, values, low);
            std::copy(values, values + columns, r.g + t * r.in + column);
        }
    }

    static void run(void* context, int index) {
        Work& work = *static_cast<Work*>(context);
        const int64_t first = index * work.chunk, end = std::min(first + work.chunk, work.r.tokens);
        Counts counts;
        for (int64_t t = first; t < end; ++t) {
            if (work.r.type == Scalar::f32)
                work.token<Single>(t, counts);
            else if (work.r.type == Scalar::bf16)
                work.token<Bfloat>(t, counts);
            else
                work.token<Half>(t, counts);
        }
        work.infinite += counts.infinite;
        work.clipped += counts.clipped;
    }
};

}  // namespace

Counts round_activations(const Rounding& rounding, int threads) {
    const int64_t most = threads > 1 ? 4 * int64_t{threads} : 1;
    const int64_t chunk = std::max<int64_t>(1, (rounding.tokens + most - 1) / most);
    Work work{rounding, chunk};
    parallel(static_cast<int>((rounding.tokens + chunk - 1) / chunk), threads, Work::run, &work);
    return {work.infinite, work.clipped};
}

}  // namespace bitmosaic
