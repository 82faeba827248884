"""A step on its way around the ring: its chunks, and what has come back of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from planetserve.edge.chunk import StepChunk
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import FrameHeader
from planetserve.wire.step import StepTable


@dataclass(slots=True)
class RingStep:
    """A step under way; a `DueAnswer` for the edge that comes back to the client."""

    number: int
    chunks: Sequence[StepChunk]
    hidden_TD: torch.Tensor
    keep_last: bool
    output_TD: torch.Tensor | None = None
    num_answered: int = 0
    offset: int = 0
    room: asyncio.Event = field(default_factory=asyncio.Event)

    def table_of(self, header: FrameHeader) -> StepTable | None:
        """The table of the chunk that is due; None if this one has been answered before, by a hop
        that was replaced since.

        Raises:
            RemoteProtocolError: neither of them.
        """
        place, due = (header.step, header.chunk), (self.number, self.num_answered)
        if place < due:
            return None
        if place != due:
            raise RemoteProtocolError("the chain answered another step than was asked")
        return self.chunks[self.num_answered].table

    def take(self, chunk_TD: torch.Tensor) -> None:
        """Put the outputs of the chunk that is due in their place.

        Raises:
            RemoteProtocolError: they are not those that were asked for.
        """
        table = self.chunks[self.num_answered].table
        chunk_TD = self._wanted(table, chunk_TD)
        num_tokens = table.num_tokens
        if len(self.chunks) == 1 and len(chunk_TD) == num_tokens:
            self.output_TD = chunk_TD  # a decode step
        else:
            self._put(table, chunk_TD)
        self.offset += num_tokens
        self.num_answered += 1
        self.room.set()

    def _wanted(self, table: StepTable, chunk_TD: torch.Tensor) -> torch.Tensor:
        if not self.keep_last and len(chunk_TD) == table.num_tokens:
            return chunk_TD
        if self.keep_last and len(chunk_TD) == len(table.rows):
            return chunk_TD
        if self.keep_last and len(chunk_TD) == table.num_tokens:
            return chunk_TD[table.last_tokens()]  # on the way, a hop has asked for all of them
        raise RemoteProtocolError("the chain answered for other tokens than was asked")

    def _put(self, table: StepTable, chunk_TD: torch.Tensor) -> None:
        if self.output_TD is None:
            self.output_TD = torch.zeros_like(self.hidden_TD)
        if self.keep_last:
            self.output_TD[[self.offset + end for end in table.last_tokens()]] = chunk_TD
        else:
            self.output_TD[self.offset : self.offset + table.num_tokens] = chunk_TD
