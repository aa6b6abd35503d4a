// x as the kernels read it: in the order of the stored columns, rounded to int8 by block, or as floats.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace bitmosaic {

// Memory that grows, is used again, and loses what it held when it grows. 64-byte aligned; 64 bytes
// beyond the end are readable.
template <class T>
class Buffer {
public:
    T* reserve(size_t count) {
        if (count > count_) {
            data_.reset(new (std::align_val_t(64)) T[count + 64 / sizeof(T)]());
            count_ = count;
        }
        return data_.get();
    }
    T* get() const { return data_.get(); }

private:
    struct Free {
        void operator()(T* data) const { ::operator delete[](data, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> data_;
    size_t count_ = 0;
};

// Tokens whose values of a column stand side by side, a cache line, where outliers meet many tokens.
constexpr int kSide = 16;

// Whether two rules for `in` columns round alike.
bool same_rule(const ActivationRule& a, const ActivationRule& b, size_t in);

// One calling thread's activations; what it held for the last call is used again where x is the same.
class Activated {
public:
    // Prepare x [tokens, in], contiguous. The result is valid until the next call.
    const Activations& operator()(const Matrix& m, const void* x, Scalar type, int tokens, Pass pass,
                                  int threads);

    // x [ceil(tokens / kSide)][in][kSide] where the matrix has outliers and there is more than one token.
    const float* sides() const { return sides_.get(); }

private:
    struct Task;
    bool same(const Matrix& m, const void* x, Scalar type, int tokens, size_t bytes) const;
    void remember(const Matrix& m, const void* x, Scalar type, size_t bytes);

    Activations view_;
    Buffer<int8_t> q_;
    Buffer<float> scale_, x_, sides_;
    Buffer<int32_t> sum_;

    // What the buffers were made from, and which of them are filled. Contents are compared, not addresses.
    size_t known_bytes_ = 0;  // of x; 0: nothing is known
    Scalar known_type_ = Scalar::f32;
    uint32_t known_in_ = 0;
    ActivationRule known_rule_;  // its arrays are the two below
    std::vector<float> known_sensitivity_;
    std::vector<uint8_t> known_band_;
    bool has_q_ = false, has_x_ = false, has_sides_ = false;
    Buffer<uint8_t> known_x_;
    std::vector<Segment> known_segments_;  // those of sum_
};

}  // namespace bitmosaic
