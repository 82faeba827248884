"""Watching what travels on an edge: whole steps, however they are cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from planetserve.edge.chunk import StepChunk
from planetserve.wire.step import StepTable


class StepObserver(Protocol):
    """Told of every step once it has been sealed, or opened and accepted, to its end.

    After a change of the edge's keys the sender may repeat a step, which the receiver drops as far
    as it has it. Each end's observer is told what its own end has sealed or accepted.
    """

    def __call__(
        self, step: int, flags: int, table: StepTable, tensor: Sequence[memoryview]
    ) -> None:
        """Take note of a step.

        Args:
            step: its number.
            flags: of its frames (`wire/frame.py`).
            table: rows and positions of all its tokens; the step's position is the start of its
                first row. On the edge that enters the client too.
            tensor: the bytes of its hidden states, one part for each chunk. With FLAG_KEEP_LAST,
                those on the edge that enters the client are of each row's last token alone.
        """
        ...


class StepWatch:
    """Puts the chunks of one end of an edge together for its observer.

    They are kept until the step is whole: as many bytes as the step's tokens, which the session
    has leased, have hidden states.
    """

    def __init__(self, observer: StepObserver):
        self._observer = observer
        self._tables: list[StepTable] = []
        self._parts: list[memoryview] = []

    def add(self, chunk: StepChunk, tensor: memoryview) -> None:
        """A chunk has been sealed or accepted; one that is numbered 0 begins its step anew."""
        if chunk.chunk == 0:
            self._tables, self._parts = [], []
        self._tables.append(chunk.table)
        self._parts.append(tensor)
        if chunk.chunk + 1 < chunk.num_chunks:
            return
        tables, parts = self._tables, self._parts
        self._tables, self._parts = [], []
        table = tables[0] if len(tables) == 1 else StepTable.merge(tables)
        self._observer(chunk.step, chunk.flags, table, parts)
