"""Runs all chunks of a batch in one `[1, tokens, hidden]` pass over the paged cache.

The model's own layers see one long sequence; only the attention function knows where one session
ends and the next begins. This is correct for models whose layers mix tokens only in their
attention; `probe` checks that before this runner is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planetserve.engine.attention import AttentionBackend, RaggedPass, register
from planetserve.engine.fused import FusedLayers
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.ragged import RaggedBatch
from planetserve.model.span_blocks import SpanBlocks
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.types import BlockSpan


class RaggedRunner:
    """A span over `num_pages` pages. The span's attention must be set to `attention.NAME`."""

    def __init__(
        self,
        blocks: SpanBlocks,
        num_pages: int,
        page_size: int,
        backend: AttentionBackend,
        max_grouped_context: int,
        fused: FusedLayers | None = None,
    ):
        """`fused`, if given, replaces the layers of `blocks`."""
        register()
        self._blocks = blocks
        self._backend = backend
        self._max_grouped_context = max_grouped_context
        self._cache = PagedKvCache(len(blocks.span), num_pages, page_size)
        self._fused = fused
        self.last_pass: RaggedPass | None = None
        """What the layers' own code did in the last pass."""

    def prepare(self, batch: ScheduledBatch) -> None:
        """Copy and clear pages as the batch says."""
        self._cache.copy_pages(batch.copies)
        self._cache.clear_pages(batch.cleared_pages)

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        """Hidden states after the blocks of `span`, `[T, D]`. May be repeated for the same chunks.

        Raises:
            UnsupportedAttention: a layer asks for attention that pages do not provide.
        """
        geometry = RaggedBatch(
            chunks,
            self._cache.page_size,
            self._cache.null_page,
            self._max_grouped_context,
            hidden_TD.device,
        )
        if self._fused is not None:
            return self._fused.run(hidden_TD, positions_T, geometry, self._cache, span)
        ragged = RaggedPass(geometry, self._cache, self._backend, self._blocks.span.start)
        self.last_pass = ragged
        return self._blocks.run(hidden_TD[None], positions_T[None], span=span, ragged=ragged)[0]
