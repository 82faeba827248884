"""Layers of the common shape as one call: what `fused` does kernel by kernel, for decode passes.

A pass of a few tokens through a small layer takes a fraction of a millisecond, so the time in
Python between two kernels counts, and every return from a call needs the GIL, which the event loop
may hold. Here the addresses and sizes of everything a layer reads are stored once, and a pass gives
the kernels only its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planetserve.engine.attention import AttentionOptions
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.layer_parts import LayerParts, RmsNorm
from planetserve.engine.native_attention import MAX_TOKENS, NativeBackend
from planetserve.engine.ragged import RaggedBatch
from planetserve.model.native_linear import NativeLinear
from planetserve.native import library

_PRODUCTS = ("query", "key", "value", "output", "gate", "up", "down")


class LayerProgram:
    """Layers over one cache. Made by `of`; holds on to everything it has the address of."""

    def __init__(self, kernels: library.Kernels, layers: Sequence[library.Layer], kept: Any):
        self._kernels = kernels
        self._layers = (library.Layer * len(layers))(*layers)
        self._kept = kept
        self._work_width = max(map(_work_width, layers))
        shapes = [layer.attention for layer in layers]
        self._scratch_heads = max(shape.heads for shape in shapes)
        self._rotated = {shape.key_width for shape in shapes}
        self._widths = max(s.key_width for s in shapes), max(s.value_width for s in shapes)

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerParts],
        options: Sequence[AttentionOptions],
        cache: PagedKvCache,
        backend: NativeBackend,
        kernels: library.Kernels,
        dtype: torch.dtype,
    ) -> LayerProgram | None:
        """The program of `layers`, or None if a part of them has no kernel."""
        described, kept = [], []
        for index, (parts, how) in enumerate(zip(layers, options, strict=True)):
            if not _is_native(parts, dtype) or not _fit_together(parts):
                return None
            width = parts.head_width
            query_1HD, key_1KD, value_1KE = (
                torch.empty(1, part.num_outputs // width, width, dtype=dtype)
                for part in (parts.query, parts.key, parts.value)
            )
            if not backend.fits(query_1HD, width):
                return None
            pages = cache.layer(index, key_1KD, value_1KE)
            sinks = None if how.sinks_H is None else how.sinks_H.float().contiguous()
            described.append(
                library.Layer(
                    entry=_norm(parts.entry),
                    query_norm=_norm(parts.query_norm),
                    key_norm=_norm(parts.key_norm),
                    middle=_norm(parts.middle),
                    attention=backend.shape(query_1HD, pages, how, torch.empty_like(query_1HD)),
                    sinks=None if sinks is None else sinks.data_ptr(),
                    keys=pages.keys_PSKD.data_ptr(),
                    values=pages.values_PSKD.data_ptr(),
                    **{name: _product(getattr(parts, name)) for name in _PRODUCTS},
                )
            )
            kept.append((parts, pages, sinks))
        return cls(kernels, described, kept)

    def takes(self, rotation: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether these cosines and sines rotate whole heads of every layer: kernels read a whole
        head width without a check."""
        return all(
            x.shape[-1] == width and x.is_contiguous() for x in rotation for width in self._rotated
        )

    def run(
        self,
        span: slice,
        hidden_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: RaggedBatch,
    ) -> torch.Tensor:
        """Hidden states after the layers of `span`, of a batch that has short chunks only.

        `takes(rotation)` must be true.
        """
        short = batch.short(MAX_TOKENS)
        num_tokens = len(hidden_TD)
        cos_TD, sin_TD = rotation
        size = library.scratch_size(self._scratch_heads, *self._widths, short.max_context)
        scratch = torch.empty(size, dtype=torch.float32)
        output_TD = hidden_TD.clone(memory_format=torch.contiguous_format)
        tokens = library.Pass(
            tokens=num_tokens,
            num_chunks=len(short.chunks_N4),
            cos=cos_TD.data_ptr(),
            sin=sin_TD.data_ptr(),
            slots=batch.slots_T.data_ptr(),
            chunks=short.chunks_N4.data_ptr(),
            tables=short.tables.data_ptr(),
            scratch=scratch.data_ptr(),
        )
        work = hidden_TD.new_empty(num_tokens * self._work_width)
        self._kernels.layers(self._layers, span, tokens, output_TD, work)
        return output_TD


def _is_native(parts: LayerParts, dtype: torch.dtype) -> bool:
    """Whether all that the layer holds is what the kernels read."""
    products = [getattr(parts, name) for name in _PRODUCTS]
    norms = [parts.entry, parts.query_norm, parts.key_norm, parts.middle]
    return all(
        type(part) is NativeLinear
        and part.packed.dtype == dtype
        and (part.bias is None or part.bias.dtype == dtype)
        for part in products
    ) and all(norm is None or norm[0].dtype == dtype for norm in norms)


def _fit_together(parts: Any) -> bool:
    """Whether the products' widths are those of the common shape; kernels do not check."""
    width = parts.query.num_inputs
    reading = (parts.key, parts.value, parts.gate, parts.up)
    norms = ((parts.query_norm, parts.query), (parts.key_norm, parts.key))
    return (
        len(parts.entry[0]) == len(parts.middle[0]) == width
        and all(norm is None or part.num_outputs % len(norm[0]) == 0 for norm, part in norms)
        and parts.query.num_outputs % parts.head_width == 0
        and parts.key.num_outputs % parts.head_width == 0
        and all(part.num_inputs == width for part in reading)
        and parts.output.num_outputs == parts.down.num_outputs == width
        and parts.output.num_inputs == parts.query.num_outputs
        and parts.key.num_outputs == parts.value.num_outputs
        and parts.up.num_outputs == parts.gate.num_outputs == parts.down.num_inputs
    )


def _product(part: Any) -> library.Product:
    bias = None if part.bias is None else part.bias.data_ptr()
    return library.Product(part.packed.data_ptr(), bias, part.num_inputs, part.num_outputs)


def _norm(norm: RmsNorm | None) -> library.Norm:
    if norm is None:
        return library.Norm()
    weight, epsilon = norm
    return library.Norm(weight.data_ptr(), len(weight), epsilon)


def _work_width(layer: library.Layer) -> int:
    """Elements that one token takes between the products."""
    attending = layer.query.outs + layer.key.outs + layer.value.outs + layer.output.width
    return int(layer.query.width + max(attending, layer.gate.outs + layer.up.outs))
