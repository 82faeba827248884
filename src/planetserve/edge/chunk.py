"""What one STEP frame carries from hop to hop, apart from what belongs to an edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planetserve.wire.step import HopLoad, StepTable, max_frame_tokens


@dataclass(slots=True)
class StepChunk:
    """One chunk of a step: its place among the steps, its tokens and their hidden states."""

    step: int
    chunk: int
    num_chunks: int
    flags: int
    table: StepTable
    hidden_TD: torch.Tensor
    loads: tuple[HopLoad, ...] = ()
    """What the hops that the step has passed say of their loads, in order."""

    def with_hidden(self, hidden_TD: torch.Tensor) -> StepChunk:
        """The same chunk with what a hop has computed of it."""
        return StepChunk(
            self.step, self.chunk, self.num_chunks, self.flags, self.table, hidden_TD, self.loads
        )


def split_step(
    table: StepTable, hidden_TD: torch.Tensor, max_tokens: int, *, step: int, flags: int
) -> list[StepChunk]:
    """The chunks of a step, each of at most `max_tokens` tokens and of what fits a frame."""
    max_tokens = min(max_tokens, max_frame_tokens(hidden_TD.shape[1] * hidden_TD.itemsize))
    pieces = table.split(max(1, max_tokens))
    if len(pieces) == 1:
        return [StepChunk(step, 0, 1, flags, table, hidden_TD)]
    chunks, offset = [], 0
    for index, piece in enumerate(pieces):
        end = offset + piece.num_tokens
        chunks.append(StepChunk(step, index, len(pieces), flags, piece, hidden_TD[offset:end]))
        offset = end
    return chunks
