"""Runs one sequence per pass on a plain cache: for models that cannot share a pass.

Slower than the other runners and correct for every model whose cache can be cut: it uses the
model's own attention, masks and cache arithmetic. It is also the reference that the others are
checked against when a span is loaded. Pages are only accounted for, never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from planetserve.model.span_blocks import SpanBlocks, SpanCache
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.types import BlockSpan


class PlainRunner:
    """A `SpanCache` per sequence."""

    def __init__(self, blocks: SpanBlocks):
        self._blocks = blocks
        self._caches: dict[int, SpanCache] = {}

    def prepare(self, batch: ScheduledBatch) -> None:
        """Forget and fork sequences as the batch says."""
        for sequence_id in batch.released:
            self._caches.pop(sequence_id, None)
        for new, source in batch.forks:
            if source in self._caches:
                self._caches[new] = copy.deepcopy(self._caches[source])

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        """Hidden states after the blocks of `span`, `[T, D]`. May be repeated for the same chunks.

        A sequence must always come with the same `span`.
        """
        outputs = []
        start = 0
        for chunk in chunks:
            stop = start + chunk.num_tokens
            cache = self._caches.get(chunk.sequence_id)
            if cache is None or chunk.start == 0:
                cache = self._caches[chunk.sequence_id] = self._blocks.make_cache(span)
            if cache.get_seq_length(span.start) > chunk.start:
                cache.truncate(chunk.start)
            output = self._blocks.run(
                hidden_TD[None, start:stop], positions_T[None, start:stop], cache, span=span
            )
            outputs.append(output[0])
            start = stop
        return torch.cat(outputs)
