// The plan of a channel-wise matrix: whole columns, each with a grid of its own, gathered by format.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace bitmosaic {

// Panels abreast: each cell's tables are fetched from L2 once for so many.
constexpr uint32_t kAbreast = 8;

// Whether tiles span all rows, are narrower than a block, and hold grids without scales (at least one of them
// learned), 16-bit patterns, or nothing.
bool is_channel_wise(const Plan& plan);

// Bytes that `gather_channels` takes at least, known before it takes any.
uint64_t channel_bytes(const File& file);

// Sort the columns and cut them into cells, which are those of every panel.
Channels gather_channels(const Plan& plan);

}  // namespace bitmosaic
