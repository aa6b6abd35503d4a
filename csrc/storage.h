// Memory of prepared matrices: blocks cut from slabs of huge pages that all matrices share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitmosaic {

// A block of memory, aligned to 64 bytes, freed with its owner. Its content is not set.
class Block {
public:
    explicit Block(size_t size);  // throws std::bad_alloc
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }  // as asked for, rounded up to 64

private:
    size_t size_;
    uint8_t* data_;
};

}  // namespace bitmosaic
