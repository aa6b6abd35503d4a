// Outliers of a panel times tokens.
#pragma once

#include "kernels.h"

namespace bitmosaic {

// Add the outliers of panel `panel` times tokens [first, first + count) to y [count][64]. A lone token reads
// a.x, several read `sides` (activations.h) with `first` a multiple of kSide. Per row, entries i from 0:
//
//   s[k] = sum over i = k, k + 4, .. of delta[i] * x[column[i]]     k = 0 to 3
//   y    = y + ((s[0] + s[1]) + (s[2] + s[3]))                      each step rounded to float
void add_outliers(const Matrix& m, uint32_t panel, const Activations& a, const float* sides, int first,
                  int count, float* y);

}  // namespace bitmosaic
