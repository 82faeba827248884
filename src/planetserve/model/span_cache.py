"""What the layers of a span cache: keys and values, states, both, or nothing.

Read off the cache layers that transformers makes for a configuration, so a family needs no entry. A
state stands for all tokens before it (linear attention, Mamba, short convolutions): it has the same
size for any number of tokens, and it cannot be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from planetserve.types import BlockSpan


class LayerKind(NamedTuple):
    """What one layer caches: keys and values or not, and how many states."""

    has_keys: bool = True
    num_states: int = 0


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a layer caches per token: `num_heads` keys of `key_dim`, values of `value_dim`."""

    num_heads: int
    key_dim: int
    value_dim: int


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """What each layer of a model caches."""
    return [_kind_of(layer) for layer in DynamicCache(config=config).layers]


def _kind_of(layer: object) -> LayerKind:
    num_states = 0
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        num_states = layer.number_of_states
    return LayerKind(isinstance(layer, CacheLayerMixin), num_states)


class SpanCache(DynamicCache):
    """The cache of one session for the layers of a span, addressed by their true index.

    Every layer keeps its full history of keys and values, also those with a sliding window: the
    mask hides what the window excludes, and a rollback never needs what was thrown away. States are
    changed in place and cannot be rolled back here.
    """

    def __init__(self, span: BlockSpan, kinds: Sequence[LayerKind] = ()):
        """`kinds`: what the layers of `span` cache; by default keys and values alone."""
        kinds = kinds or [LayerKind()] * len(span)
        Cache.__init__(self, layers=[_make_layer(kind) for kind in kinds])
        self.span = span
        self.num_tokens = 0
        """Tokens that have passed the span; for spans whose layers cannot tell."""
        self._with_keys = [index for index, kind in enumerate(kinds) if kind.has_keys]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's keys and values and return all of them."""
        index = layer_idx - self.span.start
        return super().update(key_states, value_states, index, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; a layer of the span answers for itself, anything else for the first one."""
        index = self._keys_of(layer_idx)
        return self.num_tokens if index is None else super().get_seq_length(index)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of the mask for `query_length` new tokens."""
        index = self._keys_of(layer_idx)
        if index is None:
            return self.num_tokens + query_length, 0
        return super().get_mask_sizes(query_length, index)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A convolution's last inputs, or None before the first token."""
        return super().get_conv_state(layer_idx - self.span.start, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Append to a convolution's inputs; returns those kept and the new ones."""
        index = layer_idx - self.span.start
        return super().update_conv_state(conv_states, index, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's state, or None before the first token."""
        return super().get_recurrent_state(layer_idx - self.span.start, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Replace a layer's state."""
        index = layer_idx - self.span.start
        return super().update_recurrent_state(recurrent_states, index, state_idx, **kwargs)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether a layer, or the span, has seen tokens."""
        return self.num_tokens > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether layers keep what they would need to roll back; never."""
        return False

    @property
    def state_bytes(self) -> int:
        """Bytes of all states held."""
        layers = [
            layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)
        ]
        states = (
            state
            for layer in layers
            for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
        )
        return sum(state.nbytes for state in states if state is not None)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens. Of spans without states alone."""
        self.crop(min(0, num_tokens - self.get_seq_length(self.span.start)))
        self.num_tokens = num_tokens

    def _keys_of(self, layer_idx: int) -> int | None:
        """Index in the span of a layer that knows the number of tokens: this one, or the first."""
        index = layer_idx - self.span.start
        return index if index in self._with_keys else next(iter(self._with_keys), None)


def _make_layer(kind: LayerKind) -> Any:
    if not kind.num_states:
        return DynamicLayer()
    if kind.has_keys:
        return LinearAttentionAndFullAttentionLayer(number_of_states=kind.num_states)
    return LinearAttentionLayer(number_of_states=kind.num_states)
