"""Runs chunks of equally many tokens as one left-padded batch of the model's own code.

For models whose attention cannot be replaced. They get the same inputs as from `generate`: rows, a
mask of the padding, positions, and a cache that returns the keys and values of whole rows; only the
storage in pages differs. Longer chunks run alone over the same pages. `probe` checks before this
runner is used that a family treats padded rows as it does single sequences.

Legend: B rows, T new tokens of each, S tokens of the longest row, K heads of keys and values, D
width of a head or of a hidden state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.padded import PaddedBatch, Scratch, SharingLimits, shared_passes
from planetserve.engine.passes import run_in_passes
from planetserve.engine.state_store import StateAccess, StateStore
from planetserve.model.span_blocks import SpanBlocks
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.types import BlockSpan


class PaddedRunner:
    """A span over `num_pages` pages, by its own attention."""

    def __init__(
        self,
        blocks: SpanBlocks,
        num_pages: int,
        page_size: int,
        limits: SharingLimits,
        *,
        by_token: bool = False,
    ):
        """`by_token`: recurrent layers go on from a state with one token at a time."""
        self._blocks = blocks
        self._by_token = by_token
        self._limits = limits
        self._cache = PagedKvCache(len(blocks.span), num_pages, page_size)
        self._scratch = (Scratch(), Scratch())
        self._has_states = any(kind.num_states for kind in blocks.kinds)
        self.states = StateStore(blocks.kinds)

    def prepare(self, batch: ScheduledBatch) -> None:
        """Copy and clear pages as the batch says, and forget and fork states."""
        if self._has_states:
            self.states.prepare(batch)
        self._cache.copy_pages(batch.copies)
        self._cache.clear_pages(batch.cleared_pages)

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        """Hidden states after the blocks of `span`, `[T, D]`.

        May be repeated for the same chunks.
        """

        def run(
            part: Sequence[ScheduledChunk], hidden: torch.Tensor, at: torch.Tensor
        ) -> torch.Tensor:
            if self._by_token and part[0].start and part[0].num_tokens > 1:
                return run_by_token(part, hidden, at)
            batch = PaddedBatch(part, self._cache.page_size, self._cache.null_page, hidden.device)
            pages = (batch, self._cache, self._scratch, self._blocks.span.start)
            cache = _HybridCache(*pages, self.states, part) if has_states else _PassCache(*pages)
            output_BTD = self._blocks.run(
                hidden.unflatten(0, (batch.num_rows, batch.num_tokens)),
                at.unflatten(0, (batch.num_rows, batch.num_tokens)),
                cache,
                batch.mask_BS if has_keys else None,
                span=span,
            )
            if isinstance(cache, _HybridCache):
                cache.keep()
            return output_BTD.flatten(0, 1)

        def run_by_token(
            part: Sequence[ScheduledChunk], hidden: torch.Tensor, at: torch.Tensor
        ) -> torch.Tensor:
            num_tokens = part[0].num_tokens
            hidden_BTD, at_BT = (x.unflatten(0, (len(part), num_tokens)) for x in (hidden, at))
            outputs = [
                run([_token(chunk, index) for chunk in part], hidden_BTD[:, index], at_BT[:, index])
                for index in range(num_tokens)
            ]
            return torch.stack(outputs, dim=1).flatten(0, 1)

        kinds = self._blocks.kinds_of(span)
        has_keys = any(kind.has_keys for kind in kinds)
        has_states = any(kind.num_states for kind in kinds)
        passes = shared_passes(chunks, self._limits, has_states=self._has_states)
        return run_in_passes(run, chunks, passes, hidden_TD, positions_T)


def _token(chunk: ScheduledChunk, index: int) -> ScheduledChunk:
    """One token of a chunk; the state after it stays for the next one."""
    start = chunk.start + index
    is_last = index == chunk.num_tokens - 1
    return dataclasses.replace(
        chunk,
        start=start,
        num_tokens=1,
        slots=chunk.slots[index : index + 1],
        kept_states=chunk.kept_states if is_last else (*chunk.kept_states, start, start + 1),
    )


class _PassCache(Cache):
    """The pages as one pass sees them; layers are addressed by their true index.

    Whole sequences, also for layers with a sliding window, as in `SpanCache`. What a layer gets is
    valid until the next one asks.
    """

    def __init__(
        self,
        batch: PaddedBatch,
        pages: PagedKvCache,
        scratch: tuple[Scratch, Scratch],
        first_layer: int,
    ):
        super().__init__(layers=[])
        self._batch = batch
        self._pages = pages
        self._scratch = scratch
        self._first_layer = first_layer

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's keys and values `[B, K, T, D]`; all of them, `[B, K, S, D]`."""
        batch = self._batch
        pages = self._pages.write(
            layer_idx - self._first_layer,
            batch.slots,
            key_states.transpose(1, 2).flatten(0, 1),
            value_states.transpose(1, 2).flatten(0, 1),
        )
        for_keys, for_values = self._scratch
        return (
            batch.all_tokens(key_states, pages.keys_NKD, for_keys),
            batch.all_tokens(value_states, pages.values_NKD, for_values),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this pass, padding included."""
        return self._batch.num_keys - self._batch.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of the mask."""
        return self._batch.num_keys, 0


class _HybridCache(StateAccess, _PassCache):
    """The same with states of recurrent layers, from a store."""

    def __init__(
        self,
        batch: PaddedBatch,
        pages: PagedKvCache,
        scratch: tuple[Scratch, Scratch],
        first_layer: int,
        store: StateStore,
        chunks: Sequence[ScheduledChunk],
    ):
        _PassCache.__init__(self, batch, pages, scratch, first_layer)
        StateAccess.__init__(self, store, chunks, first_layer)
