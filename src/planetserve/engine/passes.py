"""A batch in several passes, each of some of its chunks, with the outputs put back in order.

Legend: T tokens of a batch, D width of a hidden state.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from planetserve.engine.pinned_copy import integers
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.types import BlockSpan

Run = Callable[[Sequence[ScheduledChunk], torch.Tensor, torch.Tensor], torch.Tensor]
"""From chunks, their hidden states `[T, D]` and their positions `[T]` to outputs `[T, D]`."""


class Runner(Protocol):
    """One way to run batches; see `SpanRunner`, whose methods these are."""

    def prepare(self, batch: ScheduledBatch) -> None:
        """Carry out what the batch says about sequences and pages."""
        ...

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        """Hidden states after the blocks of `span`, `[T, D]`."""
        ...


def token_rows(chunks: Sequence[ScheduledChunk], members: Sequence[int]) -> array[int]:
    """Indices of the tokens of some chunks in the concatenation of all chunks."""
    ends = list(itertools.accumulate(chunk.num_tokens for chunk in chunks))
    rows = array("q")
    for index in members:
        rows.extend(range(ends[index] - chunks[index].num_tokens, ends[index]))
    return rows


def run_in_passes(
    run: Run,
    chunks: Sequence[ScheduledChunk],
    passes: Sequence[Sequence[int]],
    hidden_TD: torch.Tensor,
    positions_T: torch.Tensor,
) -> torch.Tensor:
    """Outputs `[T, D]` of chunks that go through `run` in `passes`, lists of their indices."""
    if len(passes) == 1:
        return run(chunks, hidden_TD, positions_T)
    output_TD = torch.empty_like(hidden_TD)
    for members in passes:
        rows = integers(token_rows(chunks, members), hidden_TD.device)
        part = [chunks[index] for index in members]
        output_TD[rows] = run(part, hidden_TD[rows], positions_T[rows])
    return output_TD


def split_by_length(runner: Runner, constant_length: int | None) -> Runner:
    """A runner for a model with this `constant_rotary_length`."""
    return runner if constant_length is None else SplitByLength(runner, constant_length)


class SplitByLength:
    """Another runner for a model whose rotary frequencies depend on the longest position of a pass.

    Sequences within the length up to which frequencies are constant share passes; each of the
    others has a pass of its own.
    """

    def __init__(self, runner: Runner, constant_length: int):
        self._runner = runner
        self._constant_length = constant_length

    def prepare(self, batch: ScheduledBatch) -> None:
        """As of the runner in it."""
        self._runner.prepare(batch)

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        """As of the runner in it."""
        within, passes = [], []
        parts = positions_T.cpu().split([chunk.num_tokens for chunk in chunks])
        for index, part in enumerate(parts):
            if int(part.max()) < self._constant_length:
                within.append(index)
            else:
                passes.append([index])
        if within:
            passes.append(within)

        def run(
            part: Sequence[ScheduledChunk], hidden: torch.Tensor, at: torch.Tensor
        ) -> torch.Tensor:
            return self._runner.forward(part, hidden, at, span)

        return run_in_passes(run, chunks, passes, hidden_TD, positions_T)
