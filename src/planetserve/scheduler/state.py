"""What the scheduler knows of each session, and the batch that it is making.

Owned by the scheduler; `preemption.py` edits it on the scheduler's behalf.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from planetserve.scheduler.batch import ScheduledChunk, StepRequest
from planetserve.scheduler.kv_row import Sequence


@dataclass(slots=True, eq=False)
class Progress:
    """A queued work item: its rows before `row` are done, and `row_tokens` tokens of that row.

    Attributes:
        is_restored: it brings back what rows held before pages were taken from them; its outputs
            are known already.
    """

    item: StepRequest
    arrival: int
    num_left: int
    is_decode: bool
    is_restored: bool = False
    started: bool = False
    row: int = 0
    row_tokens: int = 0

    @property
    def num_done(self) -> int:
        """Tokens that have run."""
        return self.item.num_tokens - self.num_left

    def left(self) -> list[tuple[int, int, int]]:
        """`(row, start, end)` of what has not run yet."""
        rest = [(chunk.row, chunk.start, chunk.end) for chunk in self.item.rows[self.row :]]
        if rest:
            row, start, end = rest[0]
            rest[0] = (row, start + self.row_tokens, end)
        return rest


@dataclass(slots=True, eq=False)
class Lost:
    """What a session held before pages were taken from it.

    Attributes:
        lengths: tokens that each row held; its sequence has fewer or as many.
        forks: per row, the earlier row whose pages it shared, and how many tokens of them.
        pending: rows that become forks again when their turn comes.
    """

    lengths: list[int]
    forks: list[tuple[int, int]]
    pending: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Session:
    """An open session.

    Attributes:
        owner: who opened it.
        rows: its sequences.
        planned_lengths: length of each row after everything queued has run.
        queue: its steps, in order.
        lost: what must be recomputed before the next of them, if pages were taken.
        restoring: the part of a recomputation that is left, once it is planned.
    """

    owner: str
    rows: list[Sequence]
    planned_lengths: list[int]
    queue: deque[Progress] = field(default_factory=deque)
    lost: Lost | None = None
    restoring: Progress | None = None

    @property
    def head(self) -> Progress:
        """What runs next."""
        return self.restoring or self.queue[0]

    @property
    def is_decoding(self) -> bool:
        """Whether a decode step runs next."""
        return self.lost is None and self.queue[0].is_decode

    @property
    def num_pages(self) -> int:
        """Pages that its rows hold, each counted once."""
        if len(self.rows) == 1:
            return len(self.rows[0].pages) + len(self.rows[0].state_pages)
        shared = {page for row in self.rows for page in row.pages}
        return len(shared) + sum(len(row.state_pages) for row in self.rows)


@dataclass(slots=True)
class Draft:
    """A batch being made."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    forks: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    cleared_pages: list[int] = field(default_factory=list)
    decoding: list[bytes] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    rewound: list[tuple[int, int]] = field(default_factory=list)
    cut: set[bytes] = field(default_factory=set)
    """Sessions that lost pages to this batch."""
    cut_sequences: list[int] = field(default_factory=list)
    """Rows of theirs that lost their states as well."""
    num_prefill_tokens: int = 0
