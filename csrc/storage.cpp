// An arena of huge pages. Reading the weights is what one token waits for, and 4 KB pages cost 15 to 18 %
// of that bandwidth (one core: 25.7 to 21.9 GB/s). A mapping for each matrix would leave half a page of 2 MB
// unused behind each; so slabs of at least 32 MB serve all matrices, first fit, and are unmapped with the
// last matrix in them. Pages that nobody has touched cost nothing.
#include "storage.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

// Where the address sanitizer watches, each block stands alone, so that it sees reads beyond the end.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define BITMOSAIC_SLABS
#include <sys/mman.h>
#endif

namespace bitmosaic {
namespace {

constexpr size_t kAlign = 64;

size_t round_up(size_t size, size_t unit) {
    if (size > SIZE_MAX - unit) throw std::bad_alloc();
    return (size + unit - 1) / unit * unit;
}

#ifdef BITMOSAIC_SLABS

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kSlab = size_t{32} << 20;

// Anonymous memory aligned to huge pages.
uint8_t* map_pages(size_t size) {
    const size_t room = round_up(size, kPage) + kPage;
    void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    uint8_t* const start = static_cast<uint8_t*>(mapped);
    const size_t before = (kPage - reinterpret_cast<uintptr_t>(start) % kPage) % kPage;
    if (before) munmap(start, before);
    munmap(start + before + size, room - before - size);
    madvise(start + before, size, MADV_HUGEPAGE);  // a wish: without it all works, slower
    return start + before;
}

struct Range {
    size_t start, end;
};

class Slab {
public:
    explicit Slab(size_t size) : size_(size), free_{{0, size}}, base_(map_pages(size)) {}
    ~Slab() { munmap(base_, size_); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    bool empty() const { return blocks_ == 0; }
    bool holds(const uint8_t* block) const { return block >= base_ && block < base_ + size_; }

    uint8_t* take(size_t size) {  // null where no free range is large enough
        // Between n blocks lie at most n + 1 free ranges: giving back never needs memory.
        free_.reserve(blocks_ + 2);
        for (size_t i = 0; i < free_.size(); ++i) {
            Range& range = free_[i];
            if (range.end - range.start < size) continue;
            uint8_t* const block = base_ + range.start;
            range.start += size;
            if (range.start == range.end) free_.erase(free_.begin() + i);
            ++blocks_;
            return block;
        }
        return nullptr;
    }

    void give_back(const uint8_t* block, size_t size) {
        const size_t start = block - base_;
        auto next = std::find_if(free_.begin(), free_.end(), [&](Range r) { return r.start > start; });
        next = free_.insert(next, Range{start, start + size});
        if (next + 1 != free_.end() && next->end == (next + 1)->start) {
            next->end = (next + 1)->end;
            free_.erase(next + 1);
        }
        if (next != free_.begin() && (next - 1)->end == next->start) {
            (next - 1)->end = next->end;
            next = free_.erase(next) - 1;
        }
        --blocks_;
        // Whole pages that became free go back to the system, also while others keep the slab.
        const size_t first = round_up(std::max(next->start, start - start % kPage), kPage);
        const size_t last = std::min(next->end, round_up(start + size, kPage)) / kPage * kPage;
        if (first < last) madvise(base_ + first, last - first, MADV_DONTNEED);
    }

private:
    size_t size_;
    size_t blocks_ = 0;
    std::vector<Range> free_;  // ascending, never adjacent
    uint8_t* base_;
};

class Arena {
public:
    uint8_t* take(size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& slab : slabs_)
            if (uint8_t* block = slab->take(size)) return block;
        slabs_.reserve(slabs_.size() + 1);
        auto fresh = std::make_unique<Slab>(std::max(kSlab, round_up(size, kPage)));
        uint8_t* const block = fresh->take(size);
        slabs_.push_back(std::move(fresh));
        return block;
    }

    void give_back(const uint8_t* block, size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto slab = std::find_if(slabs_.begin(), slabs_.end(),
                                       [&](const auto& each) { return each->holds(block); });
        (*slab)->give_back(block, size);
        if ((*slab)->empty()) slabs_.erase(slab);
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Slab>> slabs_;
};

Arena& arena() {  // never destroyed: matrices may outlive static objects
    static Arena& it = *new Arena;
    return it;
}

uint8_t* take(size_t size) { return arena().take(size); }
void give_back(uint8_t* block, size_t size) { arena().give_back(block, size); }

#else

uint8_t* take(size_t size) {
    return static_cast<uint8_t*>(::operator new(size, std::align_val_t{kAlign}));
}
void give_back(uint8_t* block, size_t) { ::operator delete(block, std::align_val_t{kAlign}); }

#endif

}  // namespace

Block::Block(size_t size) : size_(round_up(std::max(size, kAlign), kAlign)), data_(take(size_)) {}

Block::~Block() { give_back(data_, size_); }

}  // namespace bitmosaic
