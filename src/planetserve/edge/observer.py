"""Watching what travels on an edge, at either end of it."""

from __future__ import annotations

from typing import Protocol

from planetserve.edge.chunk import StepChunk


class StepObserver(Protocol):
    """Told of every chunk of a step once it has been sealed, or opened and accepted, to its end.

    After a change of the edge's keys the sender may repeat a step, from its chunk 0, which the
    receiver drops as far as it has it. Each end's observer is told what its own end has sealed or
    accepted.
    """

    def __call__(self, chunk: StepChunk, tensor: memoryview) -> None:
        """Take note of a chunk.

        Args:
            chunk: its place and its table, on the edge that enters the client too.
            tensor: the bytes of its hidden states as they travel. With FLAG_KEEP_LAST, those on the
                edge that enters the client are of the last token of each row in the chunk alone.

        Raises:
            RemoteProtocolError: the tensor is not of the tokens that the chunk names.
        """
        ...
