"""What a hop has sent on, kept so that whoever takes the next hop's place can be filled.

Two parts: what belongs to steps that the client has its answers to, as rows; and the frames of the
step under way, as they were, since some hops downstream may have seen them and some not. Memory is
bounded by the session's lease: one hidden state for every token in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planetserve.history import History
from planetserve.wire.frame import FrameHeader
from planetserve.wire.step import StepTable


@dataclass(frozen=True, slots=True)
class SentChunk:
    """One frame that was passed on: the header it came with, and what left."""

    header: FrameHeader
    table: StepTable
    hidden_TD: torch.Tensor


class Journal:
    """The record of one edge of a session of `num_rows` rows."""

    def __init__(self, num_rows: int):
        self._settled = History(num_rows)
        self._recent: list[SentChunk] = []

    def add(self, chunk: SentChunk) -> None:
        """Record a frame; the frames of a step before it are taken for answered."""
        if self._recent and self._recent[-1].header.step != chunk.header.step:
            self.settle(chunk.header.step)
        hidden_TD = chunk.hidden_TD
        if hidden_TD.untyped_storage().nbytes() > 2 * hidden_TD.nbytes:
            # A row of a batch would keep the whole batch in memory.
            chunk = SentChunk(chunk.header, chunk.table, hidden_TD.clone())
        self._recent.append(chunk)

    def settle(self, first_step: int) -> None:
        """Steps before `first_step` are answered: only what they left in the rows counts."""
        for chunk in self._recent:
            if chunk.header.step < first_step:
                self._settled.append(chunk.table, chunk.hidden_TD)
        self._recent = [chunk for chunk in self._recent if chunk.header.step >= first_step]

    def replay(self) -> tuple[StepTable, torch.Tensor] | None:
        """One step that fills an empty hop with what is settled, or None if nothing is."""
        return self._settled.replay()

    def recent(self) -> list[SentChunk]:
        """The frames that are not settled, in order."""
        return list(self._recent)
