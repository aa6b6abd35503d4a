// The two things done with a prepared matrix: multiply, and look rows up.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace bitmosaic {

// y [tokens, out] = x [tokens, in] W^T + bias, all contiguous and of type `type`; bias may be null.
// Results depend neither on `threads` nor on how tokens are batched.
void linear(const Matrix& m, const void* x, Scalar type, int64_t tokens, const void* bias, void* y,
            Pass pass, int threads);

// A product of a call that makes several of one token.
struct Product {
    const Matrix& m;
    const float* bias;  // may be null
    float* y;           // [out]
};

// y = x W^T + bias of one token and several matrices that read it, float32. Those that read x alike, as q, k
// and v do, are shared out among the threads as if they were one.
void linear_of_one(const Product* products, int count, const float* x, Pass pass, int threads);

// y [count, in] = rows of W in x's original order of columns: the decode law to the bit, then rounded to
// `type`; outliers are the stored values. Throws std::out_of_range for an index below 0 or from `out` on.
void rows(const Matrix& m, const int64_t* indices, int64_t count, Scalar type, void* y, int threads);

}  // namespace bitmosaic
