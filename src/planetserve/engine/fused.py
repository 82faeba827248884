"""Decoder layers of the common shape, run kernel by kernel instead of module by module.

A decode step of a small model spends a fifth of its time outside its matrix products: some forty
operators per layer, each a call through Python and PyTorch. Most families' layers are the same
dozen steps: norm, queries, keys and values, rotary embedding, attention, output, norm, gated
product. Such layers are recognised by their parts (`layer_parts`), and `probe` compares their
results with the model's own code before they are used. Any other difference, such as a multiplier
in the code, is found there, and the span stays as it is. Passes of short chunks go through all
layers in one call (`layer_program`).

Legend: T tokens, H query heads, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from planetserve.engine.attention import AttentionBackend, AttentionOptions
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.layer_parts import LayerParts, recognise
from planetserve.engine.layer_program import LayerProgram
from planetserve.engine.native_attention import MAX_TOKENS, NativeBackend
from planetserve.engine.ragged import RaggedBatch
from planetserve.engine.rotary_table import RotaryTable
from planetserve.engine.sdpa import attend_groups
from planetserve.model.native_linear import NativeLinear
from planetserve.model.span_blocks import SpanBlocks
from planetserve.native import library
from planetserve.types import BlockSpan


class FusedLayers:
    """A span's layers as a sequence of kernels. Made by `of`; used by the engine thread alone."""

    def __init__(
        self,
        blocks: SpanBlocks,
        layers: Sequence[LayerParts],
        options: Sequence[AttentionOptions],
        rotary: nn.Module,
        backend: NativeBackend,
        kernels: library.Kernels,
    ):
        self._span = blocks.span
        self._layers = layers
        self._options = options
        self._rotation = RotaryTable(rotary)
        self._backend = backend
        self._kernels = kernels
        self._program: LayerProgram | None = None
        self._program_of: tuple[PagedKvCache, torch.dtype] | None = None

    @classmethod
    def of(
        cls, blocks: SpanBlocks, options: Sequence[AttentionOptions], backend: AttentionBackend
    ) -> FusedLayers | None:
        """The span's layers if they look like the common shape; None if not.

        Args:
            blocks: the span.
            options: how each of its layers attends.
            backend: only the native one has the kernels.
        """
        kernels = library.kernels()
        rotary = getattr(blocks.base, "rotary_emb", None)
        if kernels is None or not isinstance(backend, NativeBackend) or rotary is None:
            return None
        if blocks.constant_rotary_length is not None:
            return None
        layers = [recognise(layer) for layer in blocks.layers]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(layers) or len(options) != len(layers):
            return None
        return cls(blocks, found, options, rotary, backend, kernels)

    def run(
        self,
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        batch: RaggedBatch,
        cache: PagedKvCache,
        span: BlockSpan,
    ) -> torch.Tensor:
        """Hidden states after the blocks of `span`. Writes the tokens' keys and values to pages."""
        rotation = self._rotation(hidden_TD, positions_T)
        first, stop = span.start - self._span.start, span.end - self._span.start
        if batch.short(MAX_TOKENS).is_all:
            program = self._program_over(cache, hidden_TD.dtype)
            if program is not None and program.takes(rotation):
                return program.run(slice(first, stop), hidden_TD, rotation, batch)
        for index in range(first, stop):
            hidden_TD = self._run_layer(index, hidden_TD, rotation, batch, cache)
        return hidden_TD

    def _program_over(self, cache: PagedKvCache, dtype: torch.dtype) -> LayerProgram | None:
        if self._program_of != (cache, dtype):
            self._program_of = cache, dtype
            self._program = LayerProgram.of(
                self._layers, self._options, cache, self._backend, self._kernels, dtype
            )
        return self._program

    def _run_layer(
        self,
        index: int,
        hidden_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: RaggedBatch,
        cache: PagedKvCache,
    ) -> torch.Tensor:
        layer, kernels = self._layers[index], self._kernels
        num_tokens, width = len(hidden_TD), layer.head_width
        rotated = rotation[0].shape[-1]
        normed_TD = torch.empty_like(hidden_TD)
        kernels.rms_norm(hidden_TD, *layer.entry, normed_TD)
        query_THD, key_TKD, value_TKD = (
            _product(kernels, part, normed_TD).view(num_tokens, -1, width)
            for part in (layer.query, layer.key, layer.value)
        )
        for norm, x in ((layer.query_norm, query_THD), (layer.key_norm, key_TKD)):
            if norm is not None:
                rows = x.view(-1, len(norm[0]))
                kernels.rms_norm(rows, *norm, rows)
            # Some families rotate only the first part of a head.
            kernels.rotate(x if rotated == width else x[..., :rotated], *rotation)
        pages = cache.layer(index, key_TKD, value_TKD)
        kernels.store(key_TKD, batch.slots_T, pages.keys_PSKD)
        kernels.store(value_TKD, batch.slots_T, pages.values_PSKD)
        attended_THD = torch.empty_like(query_THD)
        options = self._options[index]
        self._backend.attend_short(query_THD, pages, batch, options, attended_THD)
        if not batch.short(MAX_TOKENS).is_all:
            query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_TKD, value_TKD))
            groups = batch.groups(options.visibility, longer_than=MAX_TOKENS)
            attend_groups(groups, query, key, value, pages, options, attended_THD[None])
        hidden_TD = _product(kernels, layer.output, attended_THD.view(num_tokens, -1), hidden_TD)
        kernels.rms_norm(hidden_TD, *layer.middle, normed_TD)
        gate = _product(kernels, layer.gate, normed_TD)
        kernels.silu_gate(gate, _product(kernels, layer.up, normed_TD))
        return _product(kernels, layer.down, gate, hidden_TD)


def _product(
    kernels: library.Kernels,
    layer: Any,
    x: torch.Tensor,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer's product, plus `add`."""
    if type(layer) is NativeLinear:
        state = layer._parameters  # noqa: SLF001 - nn.Module's own look-up takes microseconds
        return kernels.linear(x, state["packed"], layer.num_outputs, state["bias"], add)
    product: torch.Tensor = layer(x)
    return product if add is None else add + product
