// Fills the cells of a plan, panel by panel.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace bitmosaic {

// From where and to where. Outlier arrays are those of Matrix, null where there are none.
struct Filling {
    const Plan& plan;
    const Level& level;
    uint64_t* outliers;          // by stored row: (stored column << 32 | bits of the value), yet to be sorted
    const uint32_t* outlier_end;
    uint16_t* outlier_column;
    float *outlier_delta, *outlier_value;
    uint8_t* data;
};

// Write all that belongs to one panel. Different panels may be filled at the same time.
void fill_panel(const Filling& filling, uint32_t panel);

}  // namespace bitmosaic
