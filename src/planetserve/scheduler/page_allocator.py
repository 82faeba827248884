"""Which KV pages are in use, and by how many sequences: page numbers only, never tensors.

A page is free, or referenced by one or more page tables; the last release frees it. The allocator
prefers the page right after the one a sequence ends with, and starts new sequences where they have
room to grow, because an engine can read consecutive pages in place. That is a preference only:
any free page is correct.

Owned by the thread that owns the scheduler. It never runs out while admission goes through
`kv_reservations.py`, so running out is an internal error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from planetserve.errors import PlanetServeError

_FREE_RUN = re.compile(rb"\x00+")


class PageAccountingError(PlanetServeError):
    """Page tables and reference counts disagree: a bug in this package, never caused by a peer."""


class PageAllocator:
    """Reference-counted pages `[0, num_pages)`."""

    def __init__(self, num_pages: int):
        self._references = [0] * num_pages
        self._used = bytearray(num_pages)
        # A dict is an ordered set with constant-time removal of any page.
        self._free = dict.fromkeys(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._references) - len(self._free)

    def references(self, page: int) -> int:
        """How many page tables hold `page`."""
        return self._references[page]

    def allocate(self, after: int | None = None) -> int:
        """Take a free page with one reference.

        Args:
            after: the page the new one should follow, or None for a sequence's first page.

        Raises:
            PageAccountingError: no page is free.
        """
        if not self._free:
            raise PageAccountingError(
                f"all {self.num_pages} KV pages are in use; sessions hold more than they leased"
            )
        if after is None:
            page = self._roomiest()
        elif after + 1 in self._free:
            page = after + 1
        else:
            page = next(reversed(self._free))
        del self._free[page]
        self._used[page] = 1
        self._references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        references = self._references
        for page in pages:
            if not references[page]:
                raise PageAccountingError(f"page {page} is free and cannot be shared")
            references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; a page without references is free."""
        references = self._references
        for page in pages:
            left = references[page] - 1
            if left < 0:
                raise PageAccountingError(f"page {page} is released more often than it is held")
            references[page] = left
            if left == 0:
                self._free[page] = None
                self._used[page] = 0

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Compare reference counts with the page tables that should explain them.

        Raises:
            PageAccountingError: a page is leaked, or used without being held.
        """
        held = Counter(page for table in tables for page in table)
        for page, count in enumerate(self._references):
            if count != held[page]:
                raise PageAccountingError(
                    f"page {page} has {count} references, page tables hold it {held[page]} times"
                )
            if (count == 0) != (page in self._free) or (count == 0) == bool(self._used[page]):
                raise PageAccountingError(f"page {page} with {count} references is misfiled")

    def _roomiest(self) -> int:
        """Start of the longest free run, or its middle when a sequence may grow into its start."""
        run = max(_FREE_RUN.finditer(self._used), key=lambda match: match.end() - match.start())
        return run.start() if run.start() == 0 else (run.start() + run.end()) // 2
