// Activations rounded by a rule, without a product: what evaluation counts.
#pragma once

#include "kernels.h"

namespace bitmosaic {

struct Rounding {
    ActivationRule rule;
    const void* x;  // [tokens, in] in stored order
    Scalar type;
    int64_t tokens, in;
    float* g;       // [tokens, in], in units of the rule's scale
    uint8_t* low;   // [tokens, ceil(in / 16)]: 1 where a tile became NVFP4
};

struct Counts {
    int64_t infinite = 0;  // values of x
    int64_t clipped = 0;   // values beyond the range, infinite ones among them
};

// The same g as products are made of, whatever the number of threads.
Counts round_activations(const Rounding& rounding, int threads);

}  // namespace bitmosaic
