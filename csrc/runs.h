// What the vector levels share: where a panel's kernels stand, and which instance of one a run calls for.
#pragma once

#include <type_traits>

#include "kernels.h"

// A kernel's instance stays a function of its own: inlined into one, they share 32 registers and spill.
#define BITMOSAIC_APART __attribute__((noinline))

namespace bitmosaic {

// Runs follow one another front to back, their cells and bytes likewise. A cell begins at bytes + index * (its
// size), the next one's bytes are abreast * size further on; kernels that no channel-wise matrix has
// leave that out.
struct Place {
    const uint8_t* bytes;
    const Cell* cell;
    uint32_t index, abreast;
};

static inline Place place_of(const Matrix& m, uint32_t p) {
    return {m.data + m.panel[p].offset, m.cell + m.panel[p].cell, p % m.abreast, panels_abreast(m, p)};
}

template <Kind kind, int bits, class Use>
static void use_as(Use& use) {
    use(std::integral_constant<Kind, kind>(), std::integral_constant<int, bits>());
}

// Call use(kind, bits) with the run's, as constants that a template takes. Affine cells and small tables.
template <class Use>
static void with_quad(const Run& run, Use use) {
    using Call = void (*)(Use&);
    static constexpr Call affine[] = {
        use_as<Kind::affine, 1, Use>, use_as<Kind::affine, 2, Use>, use_as<Kind::affine, 3, Use>,
        use_as<Kind::affine, 4, Use>, use_as<Kind::affine, 5, Use>, use_as<Kind::affine, 6, Use>,
        use_as<Kind::affine, 7, Use>, use_as<Kind::affine, 8, Use>,
    };
    static constexpr Call table[] = {
        use_as<Kind::table, 1, Use>, use_as<Kind::table, 2, Use>,
        use_as<Kind::table, 3, Use>, use_as<Kind::table, 4, Use>,
    };
    (run.kind == Kind::affine ? affine : table)[run.bits - 1](use);
}

// The same for cells with small tables for each column.
template <class Use>
static void with_channels(const Run& run, Use use) {
    using Call = void (*)(Use&);
    static constexpr Call bits[] = {
        use_as<Kind::channel_table, 1, Use>, use_as<Kind::channel_table, 2, Use>,
        use_as<Kind::channel_table, 3, Use>, use_as<Kind::channel_table, 4, Use>,
    };
    bits[run.bits - 1](use);
}

// The same for all kinds.
template <class Use>
static void with_kind(const Run& run, Use use) {
    switch (run.kind) {
        case Kind::affine:
        case Kind::table: return with_quad(run, use);
        case Kind::channel_table: return with_channels(run, use);
        case Kind::wide_table: return use_as<Kind::wide_table, 8>(use);
        case Kind::wide_channel_table: return use_as<Kind::wide_channel_table, 8>(use);
        case Kind::half: return use_as<Kind::half, 16>(use);
        case Kind::bfloat: return use_as<Kind::bfloat, 16>(use);
        case Kind::single: return use_as<Kind::single, 32>(use);
    }
}

// The walk of one panel by a level's three kernels, given as functions of (run, place).
template <class Floats, class OneToken, class Tokens>
static void each_run(const Matrix& m, uint32_t p, int count, Pass pass, Floats floats, OneToken one_token,
                     Tokens tokens) {
    Place place = place_of(m, p);
    for (uint32_t r = m.panel[p].run; r < m.panel[p + 1].run; ++r) {
        const Run& run = m.run[r];
        if (pass == Pass::exact || !is_quad(run.kind))
            floats(run, place);
        else if (count == 1)
            one_token(run, place);
        else
            tokens(run, place);
    }
}

// The same in integers of `panels` panels abreast from `p` on, by floats(run, place, panel), which takes one
// of them, and channels(run, place, panels), which takes all, cell by cell.
template <class Floats, class Channels>
static void each_run_abreast(const Matrix& m, uint32_t p, int panels, Floats floats, Channels channels) {
    Place place = place_of(m, p);
    for (uint32_t r = m.panel[p].run; r < m.panel[p + 1].run; ++r) {
        const Run& run = m.run[r];
        const Place first = place;
        if (run.kind == Kind::channel_table) {
            channels(run, place, panels);
            continue;
        }
        for (int panel = 0; panel < panels; ++panel) {
            place = first;
            place.index += panel;
            floats(run, place, panel);
        }
        place.index = first.index;
    }
}

// Call one(p, y) for each panel, or together(p, panels, y) for those abreast where int8 tables are shared; y is
// what belongs to panel p of y [panels][count][64].
template <class One, class Together>
static void each_panel(const Matrix& m, uint32_t begin, uint32_t end, int count, Pass pass, float* y, One one,
                       Together together) {
    const bool shared = m.abreast > 1 && pass == Pass::integer;
    for (uint32_t p = begin, next; p < end; y += size_t{next - p} * count * kRows, p = next) {
        next = p + 1;
        if (!shared) {
            one(p, y);
            continue;
        }
        next = p / m.abreast * m.abreast + m.abreast;
        if (next > end) next = end;
        together(p, static_cast<int>(next - p), y);
    }
}

}  // namespace bitmosaic
