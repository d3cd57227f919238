#include "host/page_pool.h"

#include "common/check.h"

namespace fastkernels::host {

PagePool::PagePool(int32_t num_pages) {
    check(num_pages > 0, "a page pool needs at least one page, not ", num_pages);
    references_.resize(num_pages, 0);
    free_.resize(num_pages);
    for (int32_t i = 0; i < num_pages; ++i) {
        free_[i] = num_pages - 1 - i;  // page 0 first
    }
}

std::vector<int32_t> PagePool::allocate(int64_t num_pages) {
    check(num_pages >= 0, "the number of pages to allocate must not be negative, it is ", num_pages);
    if (num_pages > static_cast<int64_t>(free_.size())) {
        return {};
    }
    std::vector<int32_t> pages(free_.rbegin(), free_.rbegin() + num_pages);
    free_.resize(free_.size() - num_pages);
    for (int32_t page : pages) {
        references_[page] = 1;
    }
    return pages;
}

void PagePool::retain(const std::vector<int32_t>& pages) {
    check_held(pages);
    for (int32_t page : pages) {
        ++references_[page];
    }
}

void PagePool::release(const std::vector<int32_t>& pages) {
    check_held(pages);
    for (size_t i = 0; i < pages.size(); ++i) {
        if (references_[pages[i]] == 0) {  // listed more often than it was held: undo, so that nothing has changed
            while (i-- > 0) {
                if (references_[pages[i]]++ == 0) {
                    free_.pop_back();
                }
            }
            fail("a page is listed more often than it is held");
        }
        if (--references_[pages[i]] == 0) {
            free_.push_back(pages[i]);
        }
    }
}

int32_t PagePool::references(int32_t page) const {
    check(page >= 0 && page < num_pages(), "page ", page, " is not one of ", num_pages());
    return references_[page];
}

void PagePool::check_held(const std::vector<int32_t>& pages) const {
    for (int32_t page : pages) {
        check(references(page) > 0, "page ", page, " is free; only a held page is retained or released");
    }
}

}  // namespace fastkernels::host
