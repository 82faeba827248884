"""One row of one session: where its tokens live in the paged KV cache.

A sequence is a page table and a length. Truncating, forking and appending are edits of that table;
what they ask of the tensors (copy this page, clear that one) is returned as plain data. Forks share
pages by reference; the first append to a shared, partly filled page copies it (copy-on-write, as
in PagedAttention).

A slot is the flat index of a token's place, `page * page_size + offset`.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import NamedTuple

from planetserve.scheduler.page_allocator import PageAccountingError, PageAllocator


class StateBudget(NamedTuple):
    """What a row takes for states of recurrent layers; nothing by default.

    Attributes:
        pages: pages of the KV cache whose memory its states take, kept ones included. It holds them
            from its first token on.
        num_kept: states that are kept besides the one at the end of the row.
    """

    pages: int = 0
    num_kept: int = 0


@dataclass(frozen=True, slots=True)
class Appended:
    """What `Sequence.append` decided.

    Attributes:
        slots: one per token that runs.
        copy: `(source page, destination page)` to copy before anything is written, or None.
        cleared_page: a new page that stays partly empty, or None. It must be zeroed after the
            copies and before it is written, so that a batched read of whole pages reads nothing
            that another session left there (a masked NaN would still make the result NaN).
    """

    slots: array[int]
    copy: tuple[int, int] | None
    cleared_page: int | None


class Sequence:
    """Page table and length of one row. `sequence_id` is unique within its scheduler.

    With recurrent layers, tokens after the last of `states` must run again before new ones.
    """

    __slots__ = (
        "_allocator", "_budget", "_page_size",
        "length", "pages", "sequence_id", "state_pages", "states",
    )  # fmt: skip

    def __init__(
        self,
        sequence_id: int,
        allocator: PageAllocator,
        page_size: int,
        budget: StateBudget = StateBudget(),  # noqa: B008 - a constant
    ):
        self.sequence_id = sequence_id
        self.length = 0
        self.pages: array[int] = array("i")
        self.state_pages: array[int] = array("i")
        self.states: list[int] = []
        """After how many tokens states are kept, ascending; the first token needs none."""
        self._allocator = allocator
        self._page_size = page_size
        self._budget = budget

    @property
    def num_again(self) -> int:
        """Tokens at the end that must run again, because no state is kept after them."""
        if not self._budget.pages:
            return 0
        return self.length - (self.states[-1] if self.states else 0)

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
        while self.states and self.states[-1] > length:
            self.states.pop()
        if not length:
            self._allocator.release(self.state_pages)
            del self.state_pages[:]

    def fork(self, sequence_id: int) -> Sequence:
        """A second sequence with the same tokens; no page or state is copied yet."""
        twin = Sequence(sequence_id, self._allocator, self._page_size, self._budget)
        twin.states = self.states[:]
        self._allocator.share(self.pages)
        twin.pages = self.pages[:]
        twin.length = self.length
        return twin

    def append(self, num_tokens: int) -> Appended:
        """Make room for `num_tokens` more tokens, which run after those that must run again."""
        size = self._page_size
        first = self.length - self.num_again
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
        if self._budget.pages:
            while len(self.state_pages) < self._budget.pages:
                self.state_pages.append(allocator.allocate())
            self.states.append(end)
            thin(self.states, self._budget.num_kept + 1)
        return Appended(self._slots(first, end), copy, cleared_page)

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


def thin(states: list[int], max_states: int) -> None:
    """Drop the states that are least missed, until there are at most `max_states`.

    The last two always stay: the end of the row, and where its latest tokens began. What drops is
    the state without which a rollback, whose length is as likely to be 1 to 10 tokens as 10 to 100,
    runs the fewest tokens more.
    """
    while len(states) > max(2, max_states):
        end, before, best, least = states[-1], 0, 0, math.inf
        for index, (state, after) in enumerate(zip(states, states[1:-1], strict=False)):
            cost = (state - before) * math.log((end - state) / (end - after))
            if cost < least:
                best, least = index, cost
            before = state
        del states[best]
