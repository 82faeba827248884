"""One row of one session: where its tokens live in the paged KV cache.

A sequence is a page table and a length. Truncating, forking and appending are edits of that table;
what they ask of the tensors (copy this page, clear that one) is returned as plain data. Forks share
pages by reference; the first append to a shared, partly filled page copies it (copy-on-write, as
in PagedAttention).

A slot is the flat index of a token's place, `page * page_size + offset`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from planetserve.scheduler.page_allocator import PageAccountingError, PageAllocator


@dataclass(frozen=True, slots=True)
class Appended:
    """What `Sequence.append` decided.

    Attributes:
        slots: one per new token.
        copy: `(source page, destination page)` to copy before anything is written, or None.
        cleared_page: a new page that stays partly empty, or None. It must be zeroed after the
            copies and before it is written, so that a batched read of whole pages reads nothing
            that another session left there (a masked NaN would still make the result NaN).
    """

    slots: array[int]
    copy: tuple[int, int] | None
    cleared_page: int | None


class Sequence:
    """Page table and length of one row. `sequence_id` is unique within its scheduler."""

    __slots__ = ("_allocator", "_page_size", "length", "pages", "sequence_id")

    def __init__(self, sequence_id: int, allocator: PageAllocator, page_size: int):
        self.sequence_id = sequence_id
        self.length = 0
        self.pages: array[int] = array("i")
        self._allocator = allocator
        self._page_size = page_size

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises:
            PageAccountingError: the sequence is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise PageAccountingError(f"cannot cut {self.length} tokens to {length}")
        keep = -(-length // self._page_size)
        if keep < len(self.pages):
            self._allocator.release(self.pages[keep:])
            del self.pages[keep:]
        self.length = length

    def fork(self, sequence_id: int) -> Sequence:
        """A second sequence with the same tokens; no page is copied yet."""
        twin = Sequence(sequence_id, self._allocator, self._page_size)
        self._allocator.share(self.pages)
        twin.pages = self.pages[:]
        twin.length = self.length
        return twin

    def append(self, num_tokens: int) -> Appended:
        """Make room for `num_tokens` more tokens."""
        size = self._page_size
        start, end = self.length, self.length + num_tokens
        pages, allocator = self.pages, self._allocator
        copy = None
        if start % size and allocator.references(pages[-1]) > 1:
            shared = pages[-1]
            pages[-1] = allocator.allocate(after=shared)
            allocator.release((shared,))
            copy = (shared, pages[-1])
        cleared_page = None
        num_pages = -(-end // size)
        if num_pages > len(pages):
            while len(pages) < num_pages:
                pages.append(allocator.allocate(after=pages[-1] if pages else None))
            cleared_page = pages[-1] if end % size else None
        self.length = end
        return Appended(self._slots(start, end), copy, cleared_page)

    def release(self) -> None:
        """Give all pages back."""
        self.truncate(0)

    def _slots(self, start: int, end: int) -> array[int]:
        size, pages = self._page_size, self.pages
        slots = array("q")
        while start < end:
            base = pages[start // size] * size
            stop = min(end, start - start % size + size)
            slots.extend(range(base + start % size, base + start % size + stop - start))
            start = stop
        return slots
