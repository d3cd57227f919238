// The pages of a KV cache by number: which are free, and how many sequences (and, later, prefix tree nodes) hold each.
#pragma once

#include <cstdint>
#include <vector>

namespace fastkernels::host {

// Not thread-safe: one engine loop owns it. Every call checks all of its arguments before it changes anything.
class PagePool {
  public:
    explicit PagePool(int32_t num_pages);

    // num_pages free pages, each with one reference, or none at all when fewer are free.
    std::vector<int32_t> allocate(int64_t num_pages);

    // One reference more on each page. Throws std::invalid_argument for a page that is free or does not exist.
    void retain(const std::vector<int32_t>& pages);

    // One reference less on each; a page without references is free again. Pages freed last are handed out first,
    // while they may still be in a cache. Throws std::invalid_argument for a page that is free or does not exist.
    void release(const std::vector<int32_t>& pages);

    int32_t num_pages() const {
        return static_cast<int32_t>(references_.size());
    }
    int32_t num_free() const {
        return static_cast<int32_t>(free_.size());
    }
    int32_t references(int32_t page) const;

  private:
    void check_held(const std::vector<int32_t>& pages) const;

    std::vector<int32_t> references_;  // [num_pages]
    std::vector<int32_t> free_;        // a stack
};

}  // namespace fastkernels::host
