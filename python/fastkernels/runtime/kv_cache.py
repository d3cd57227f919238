"""Which pages hold which tokens: a list of pages a row (a running sequence), over the C++ page pool."""

from __future__ import annotations

from fastkernels._library import _C


class KVCache:
    """Page lists of the running sequences.

    num_pages:    pages there are, each of page_size tokens in every layer
    max_num_seqs: rows
    changes:      what was written to the page lists since it was last cleared: (row, first page index). Who
                  keeps a copy of the page table brings it up to date from here; entries past a list's end are
                  stale, which is harmless, since seq_lens bounds what a kernel reads.

    Prefix reuse: ``share`` starts a row with pages that another holds. Only full pages may be shared: they
    are never written again, while a row's last page belongs to it alone.
    """

    def __init__(self, num_pages: int, page_size: int, max_num_seqs: int) -> None:
        self.page_size = page_size
        self.pool = _C.PagePool(num_pages)
        self.pages: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.changes: list[tuple[int, int]] = []

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_used(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that num_tokens tokens fill."""
        return -(-num_tokens // self.page_size)

    def append(self, row: int, num_tokens: int) -> bool:
        """Makes room in the row for num_tokens tokens in all; False and no change when pages run out."""
        pages = self.pages[row]
        missing = -(-num_tokens // self.page_size) - len(pages)
        if missing <= 0:
            return True
        added = self.pool.allocate(missing)
        if not added:
            return False
        self.changes.append((row, len(pages)))
        pages.extend(added)
        return True

    def share(self, row: int, pages: list[int]) -> None:
        """Starts an empty row with full pages that others hold."""
        if self.pages[row]:
            raise ValueError(
                f"row {row} already holds {len(self.pages[row])} pages; only an empty row can share"
            )
        self.pool.retain(pages)
        self.changes.append((row, 0))
        self.pages[row].extend(pages)

    def free(self, row: int) -> None:
        """Gives back the row's hold on its pages."""
        if self.pages[row]:
            self.pool.release(self.pages[row])
            self.pages[row].clear()
