"""What the scheduler tells the engine to run: plain data, no tensors.

The engine does what a batch asks in this order: forget `released` sequences, make `forks`, perform
page `copies` (all sources read before any destination is written), zero `cleared_pages`, then
compute the `chunks`, each of which first cuts its sequence to `start`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from planetserve.wire.step import RowSlice


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One step of one session, as the scheduler sees it.

    Attributes:
        item_id: the caller's number for it, unique among unfinished items.
        session_id: an open session.
        rows: which new tokens of which rows; the item's tokens are theirs, row after row.
        reorder: row `i` first becomes a fork of row `reorder[i]`; None leaves the rows alone.
    """

    item_id: int
    session_id: bytes
    rows: tuple[RowSlice, ...]
    reorder: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.rows)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence that run in this batch.

    Attributes:
        item_id: the work item they belong to.
        session_id: the item's session.
        sequence_id: the sequence they are appended to.
        start: position of the first of them in the sequence; everything from there on is replaced.
        num_tokens: how many.
        offset: index among the item's tokens of the first that is not restored.
        pages: page table of the sequence up to and including these tokens (a copy).
        slots: where each token's keys and values go.
        row: the sequence's row in the session.
        num_restored: so many tokens at its beginning ran before; they are recomputed for the sake
            of the item, because their pages or the state after them are lost, and their outputs are
            known.
        kept_states: after how many tokens of the sequence the states of recurrent layers are kept
            from now on, ascending.
    """

    item_id: int
    session_id: bytes
    sequence_id: int
    start: int
    num_tokens: int
    offset: int
    pages: array[int]
    slots: array[int]
    row: int = 0
    num_restored: int = 0
    kept_states: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One tick: `forks` are `(new sequence, source sequence)`, `copies` `(from, to)` pages.

    `decoding` are the sessions whose chunks are decode steps; `num_prefill_tokens` of its tokens
    belong to other steps.

    `started` are the items that reorder and cut their rows now, in this order; they may have chunks
    in later batches only. `rewound` are `(item, tokens)`: of what the item has done, only so many
    tokens still count.
    """

    chunks: tuple[ScheduledChunk, ...] = ()
    forks: tuple[tuple[int, int], ...] = ()
    released: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    cleared_pages: tuple[int, ...] = ()
    decoding: tuple[bytes, ...] = ()
    num_prefill_tokens: int = 0
    started: tuple[int, ...] = ()
    rewound: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)
