"""The attention function that connects a model's own code to the paged cache.

`register` makes it known to transformers as `planetserve_paged`. A base model that is given the
keyword argument `ragged=RaggedPass(...)` passes it to every attention layer, which calls this
function with it and the layer's queries, keys and values. No mask is built, because transformers
has no mask function of that name. All options that a family may pass to its attention are read in
`RaggedPass.attend` and given to a backend by name; an unknown option is refused, so a model is
never served with another attention than its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from planetserve.engine.kv_cache import LayerPages, PagedKvCache
from planetserve.engine.ragged import RaggedBatch, Visibility
from planetserve.errors import ModelError
from planetserve.registry import Registry

NAME = "planetserve_paged"

# Arguments that do not affect which keys are seen or how they are weighted.
_HARMLESS = frozenset(
    {"cache_position", "dropout", "past_key_values", "position_embeddings", "position_ids"}
)


class UnsupportedAttention(ModelError):
    """A layer asks for attention that pages do not provide; the model then runs unpaged."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How one layer weighs its keys.

    Attributes:
        visibility: which keys a token sees.
        scaling: factor of the logits; None for one over the root of the key width.
        softcap: logits are squashed to `softcap * tanh(logits / softcap)`, if given.
        sinks_H: per query head, the logit of a key that every token sees and that has no value.
    """

    visibility: Visibility
    scaling: float | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """Computes attention of new tokens over pages that already hold their keys and values."""

    page_multiple: int
    """Number of tokens of which the page size must be a multiple."""

    def max_grouped_context(self, device: torch.device, key_bytes: int) -> int:
        """Longest context, in tokens, worth gathering to serve several sequences in one call.

        `key_bytes` is what one token's keys take in the widest layer.
        """
        ...

    def serves(self, options: AttentionOptions) -> bool:
        """Whether it computes at least some layers of this kind itself, without the reference
        backend."""
        ...

    def attend(
        self,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        pages: LayerPages,
        batch: RaggedBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention output `[1, T, H, width of a value]`; T tokens, H query heads, K kv heads."""
        ...


BACKENDS: Registry[AttentionBackend] = Registry(
    "attention backend",
    "attention_backends",
    {
        "auto": "planetserve.engine.attention_selector:best_backend",
        "native": "planetserve.engine.native_attention:NativeBackend",
        "sdpa": "planetserve.engine.sdpa:SdpaBackend",
        "varlen": "planetserve.engine.varlen_attention:VarlenBackend",
    },
)


class RaggedPass:
    """One forward pass: the batch, the cache, and which layers have attended so far, and how."""

    def __init__(
        self, batch: RaggedBatch, cache: PagedKvCache, backend: AttentionBackend, first_layer: int
    ):
        """`first_layer` is the `layer_idx` of the span's first layer."""
        self._batch = batch
        self._cache = cache
        self._backend = backend
        self._first_layer = first_layer
        self.layers_seen: list[int] = []
        self.options_seen: list[AttentionOptions] = []

    def attend(
        self,
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Store one layer's keys and values, then attend.

        Raises:
            UnsupportedAttention: the layer asks for something unknown here.
        """
        options = _read_options(module, arguments)
        layer = module.layer_idx - self._first_layer
        self.layers_seen.append(layer)
        self.options_seen.append(options)
        pages = self._cache.write(
            layer,
            self._batch.slots_T,
            key_1KTD[0].transpose(0, 1),
            value_1KTD[0].transpose(0, 1),
        )
        return self._backend.attend(query_1HTD, key_1KTD, value_1KTD, pages, self._batch, options)


def register() -> None:
    """Make the attention function known to transformers. Idempotent."""
    AttentionInterface.register(NAME, _paged_attention)


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    ragged: RaggedPass | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    if ragged is None:
        raise UnsupportedAttention(f"{type(module).__name__} does not pass arguments on")
    if attention_mask is not None:
        raise UnsupportedAttention(f"{type(module).__name__} brings its own attention mask")
    return ragged.attend(module, query, key, value, arguments), None


def _read_options(module: nn.Module, arguments: dict[str, Any]) -> AttentionOptions:
    window = softcap = sinks = scaling = None
    for name, value in arguments.items():
        if name == "scaling":
            scaling = value
        elif value is None or value is False or name in _HARMLESS:
            if name == "is_causal" and value is False:
                raise UnsupportedAttention(f"{type(module).__name__} is not causal")
        elif name == "sliding_window":
            window = value
        elif name == "softcap":
            softcap = value
        elif name == "s_aux":
            sinks = value
        elif name != "is_causal":
            raise UnsupportedAttention(f"{type(module).__name__} passes {name!r} to its attention")
    return AttentionOptions(_visibility(module, window), scaling, softcap, sinks)


def _visibility(module: nn.Module, window: int | None) -> Visibility:
    """What the layer sees, which its mask would say, checked against the argument it passes."""
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        kind = layer_types[module.layer_idx]
    else:
        has_window = getattr(config, "sliding_window", None) is not None
        kind = "sliding_attention" if has_window else "full_attention"
    if kind == "chunked_attention":
        return Visibility(chunk=config.attention_chunk_size)
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedAttention(f"{type(module).__name__} is a layer of type {kind!r}")
    if (kind == "sliding_attention") != (window is not None):
        raise UnsupportedAttention(
            f"{type(module).__name__} of type {kind!r} passes sliding_window={window}"
        )
    return Visibility(window=window)
