"""Decoder layers of the common shape, run kernel by kernel instead of module by module.

A decode step of a small model spends a fifth of its time between its products: some forty
operators a layer, each a call through Python and PyTorch. Most families' layers are the same dozen
steps: norm, queries, keys and values, rotary embedding, attention, output, norm, gated product.
Such layers are recognised by their parts (every parameter must be accounted for), and `probe`
compares their results with the model's own code before they are used; anything else, a multiplier
hidden in the code say, shows there and leaves the span as it is.

Legend: T tokens, H query heads, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planetserve.engine.attention import AttentionBackend, AttentionOptions
from planetserve.engine.kv_cache import PagedKvCache
from planetserve.engine.native_attention import MAX_TOKENS, NativeBackend
from planetserve.engine.ragged import RaggedBatch
from planetserve.engine.sdpa import attend_groups
from planetserve.model.native_linear import NativeLinear
from planetserve.model.skeleton import SpanBlocks
from planetserve.native import library
from planetserve.types import BlockSpan

_Norm = tuple[torch.Tensor, float]
"""Weight and epsilon of an RMS norm."""

_PARTS = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
    "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_OPTIONAL_PARTS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, slots=True)
class _Layer:
    entry: _Norm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: nn.Module
    middle: _Norm
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    head_width: int


class FusedLayers:
    """A span's layers as a sequence of kernels. Made by `of`; used by the engine thread alone."""

    def __init__(
        self,
        blocks: SpanBlocks,
        layers: Sequence[_Layer],
        options: Sequence[AttentionOptions],
        rotary: nn.Module,
        backend: NativeBackend,
        kernels: library.Kernels,
    ):
        self._span = blocks.span
        self._layers = layers
        self._options = options
        self._rotary = rotary
        self._backend = backend
        self._kernels = kernels

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
        layers = [_recognise(layer) for layer in blocks.layers]
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
        cos_1TD, sin_1TD = self._rotary(hidden_TD[None], positions_T[None])
        rotation = (cos_1TD[0].contiguous(), sin_1TD[0].contiguous())
        first = self._span.start
        for index in range(span.start - first, span.end - first):
            hidden_TD = self._run_layer(index, hidden_TD, rotation, batch, cache)
        return hidden_TD

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
            kernels.rotate(x, *rotation)
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


def _recognise(layer: nn.Module) -> _Layer | None:
    """The layer's parts, or None if it has others or lacks one."""
    parts = {name: _part(layer, name) for name in (*_PARTS, *_OPTIONAL_PARTS)}
    used = {id(p) for part in parts.values() if part is not None for p in part.parameters()}
    if any(parts[name] is None for name in _PARTS) or used != {id(p) for p in layer.parameters()}:
        return None
    norms = {name: _rms_norm(parts[name]) for name in parts if name.endswith("norm")}
    if any(parts[name] is not None and norm is None for name, norm in norms.items()):
        return None
    width = getattr(layer.self_attn, "head_dim", None)
    if not isinstance(width, int) or width % library.WIDTH_MULTIPLE:
        return None
    linear: Callable[[str], Any] = parts.__getitem__
    return _Layer(
        entry=norms["input_layernorm"],  # type: ignore[arg-type]  # none is missing
        query=linear("self_attn.q_proj"),
        key=linear("self_attn.k_proj"),
        value=linear("self_attn.v_proj"),
        query_norm=norms["self_attn.q_norm"],
        key_norm=norms["self_attn.k_norm"],
        output=linear("self_attn.o_proj"),
        middle=norms["post_attention_layernorm"],  # type: ignore[arg-type]
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
        head_width=width,
    )


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _rms_norm(module: nn.Module | None) -> _Norm | None:
    """Weight and epsilon of what may be an RMS norm."""
    if module is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: torch.Tensor = module.weight.detach()
    if not isinstance(epsilon, float) or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    return weight.contiguous(), epsilon
