"""The server's part of a model: its own code with only a span of its layers.

`SpanBlocks` builds the checkpoint's Hugging Face class whole on the meta device, so that whatever a
layer derives from its index (mixture-of-experts from layer k on, sliding-window patterns) is right;
loads only the span's weights; and cuts the rest away. A pass calls the base model's own `forward`
and replaces two values: the input of the first kept layer and the output of the last. So the
computations around the embedding have no effect and need no code per family.

One thread runs a `SpanBlocks`, under `torch.inference_mode()`. `engine` handles sessions and
paging.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from planetserve.errors import ConfigError, ModelError
from planetserve.model.capabilities import (
    check_servable,
    constant_rotary_length,
    warn_if_untested,
)
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.decoder import Decoder, find_decoder
from planetserve.model.loading import (
    build_on_meta,
    has_meta_parameters,
    load_parameters,
    make_empty_parameters,
    materialize_buffers,
)
from planetserve.model.span_cache import KvShape, LayerKind, SpanCache, layer_kinds
from planetserve.model.span_loading import load_span
from planetserve.types import BlockSpan

__all__ = [
    "Decoder",
    "KvShape",
    "SpanBlocks",
    "SpanCache",
    "build_on_meta",
    "find_decoder",
    "load_parameters",
    "materialize_buffers",
]


@dataclass(frozen=True, slots=True)
class _View:
    """The base model's attributes while it runs one part of the span."""

    layers: nn.ModuleList
    config: PretrainedConfig
    attributes: dict[str, Any]


@dataclass(slots=True)
class _Exchange:
    """The input of the first layer and the output of the last, in one pass."""

    incoming: torch.Tensor | None = None
    outgoing: torch.Tensor | None = None


class SpanBlocks:
    """Decoder blocks `[start, end)` of a checkpoint, runnable whole or in part.

    Made by `SpanBlocks.load`. Not thread-safe: one thread runs it.
    """

    def __init__(self, base: PreTrainedModel, decoder: Decoder, span: BlockSpan, name: str):
        self.span = span
        self.model_name = name
        self.base = base
        """The base model without what the span does not need; its `forward` is the family's own."""
        self.constant_rotary_length = constant_rotary_length(base.config)
        """If not None, longer passes embed positions by their own length: sequences must not share
        such a pass, and a prompt must not be split into chunks."""
        self.layers = nn.ModuleList(list(decoder.layers)[span.start : span.end])
        """The loaded layers, first one first."""
        self.kinds = layer_kinds(base.config)[span.start : span.end]
        """What each of them caches."""
        self._decoder = decoder
        self._config = base.config
        self._num_blocks = len(decoder.layers)
        self._lists = _lists_per_layer(vars(base), self._num_blocks)
        self._current = self._view(span)
        self._install(self._current)
        self._views = {span: self._current}
        self._attention = _attention_configs(base, self.layers)
        self._exchange = _Exchange()
        for layer in self.layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)
        self._rotary_state: list[_RotaryState] = []

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        span: BlockSpan,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        quant_type: str = "none",
        *,
        at_random: bool = False,
    ) -> SpanBlocks:
        """Load the blocks of `span` and nothing else; `at_random` reads no weights and makes them
        up, to measure what these blocks take before they are downloaded.

        `attn_implementation` is any name known to transformers' `AttentionInterface`; a family
        without SDPA runs its eager attention when `sdpa` is asked for.

        Raises:
            ModelError: the family cannot be served, or weights are missing or damaged.
            ConfigError: the span ends after the model's last block.
        """
        check_servable(checkpoint)
        if span.end > checkpoint.num_blocks:
            raise ConfigError(
                f"--block_indices {span} is out of range: {checkpoint.name} has "
                f"{checkpoint.num_blocks} blocks, so END is at most {checkpoint.num_blocks}"
            )
        warn_if_untested(checkpoint)
        model = build_on_meta(checkpoint, dtype)
        decoder = find_decoder(model)
        if at_random:  # `materialize_buffers` fills them
            make_empty_parameters(decoder.layers[span.start : span.end], device)
        else:
            load_span(model, decoder, checkpoint, span, dtype, device, quant_type)
        _drop_outside(decoder, device)
        blocks = cls(decoder.base, decoder, span, checkpoint.name)
        materialize_buffers(blocks.base, device)
        if blocks.constant_rotary_length is not None:
            blocks._rotary_state = _rotary_state(blocks.base)
        if attn_implementation != "sdpa":
            blocks.set_attention(attn_implementation)
        return blocks

    @property
    def config(self) -> PretrainedConfig:
        """The base model's configuration; its lists per layer are those of the blocks it runs."""
        return self.base.config

    def layer(self, block: int) -> nn.Module:
        """The layer of block number `block`, counted over the whole model."""
        return self.layers[block - self.span.start]

    def set_attention(self, name: str) -> None:
        """Route attention through the implementation registered as `name`, masks included."""
        views = (view.config for view in self._views.values())
        for config in (self._config, *self._attention, *views):
            config._attn_implementation = name  # noqa: SLF001  the model's setter refuses ours

    def make_cache(self, span: BlockSpan | None = None) -> SpanCache:
        """An empty cache for one session that runs `span`, by default all blocks here."""
        span = self.span if span is None else span
        return SpanCache(span, self.kinds_of(span))

    def kinds_of(self, span: BlockSpan) -> list[LayerKind]:
        """What the layers of a part of the span cache."""
        first = span.start - self.span.start
        return self.kinds[first : first + len(span)]

    def kv_shapes(self) -> list[KvShape]:
        """What each block with keys and values caches per token."""
        return [
            KvShape(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
            for layer, kind in zip(self._cache_of_one_token().layers, self.kinds, strict=True)
            if kind.has_keys
        ]

    def state_bytes(self) -> int:
        """Bytes of all states of one sequence; 0 if no block keeps any."""
        if not any(kind.num_states for kind in self.kinds):
            return 0
        return self._cache_of_one_token().state_bytes

    def _cache_of_one_token(self) -> SpanCache:
        cache = self.make_cache()
        width = self._config.hidden_size
        parameter = next(self.layers[0].parameters())
        with torch.inference_mode():
            self.run(
                torch.zeros(1, 1, width, dtype=self._config.dtype, device=parameter.device),
                torch.zeros(1, 1, dtype=torch.int64, device=parameter.device),
                cache,
            )
        return cache

    def run(
        self,
        hidden_1TD: torch.Tensor,
        position_ids_1T: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        span: BlockSpan | None = None,
        **attention_kwargs: Any,
    ) -> torch.Tensor:
        """Pass hidden states through the blocks.

        Args:
            hidden_1TD: what the block before the first one put out, `[1, tokens, hidden]`; several
                rows of equal length are fine with a cache of as many rows.
            position_ids_1T: position of each token; by default they follow the cache.
            past_key_values: keys and values so far; None runs the tokens as a whole sequence.
            attention_mask: passed on as it is.
            span: the blocks to run, within the loaded ones; by default all of them.
            attention_kwargs: passed on to the attention function.

        Returns:
            What the last of these blocks puts out, in the shape of `hidden_1TD`.

        Raises:
            ConfigError: `span` is not within the loaded blocks.
        """
        self._activate(self.span if span is None else span)
        self._restore_rotary()
        arguments: dict[str, Any] = {
            # Only shape, dtype and device of this are used; `_enter` puts the real states in.
            "inputs_embeds": torch.zeros_like(hidden_1TD),
            "attention_mask": attention_mask,
            "position_ids": position_ids_1T,
            "past_key_values": past_key_values,
            "use_cache": past_key_values is not None,
        }
        known = self._decoder.parameter_names
        arguments = {name: value for name, value in arguments.items() if name in known}
        self._exchange = exchange = _Exchange(hidden_1TD)
        try:
            self.base(**arguments, **attention_kwargs)
        finally:
            self._exchange = _Exchange()
        if exchange.outgoing is None:
            raise ModelError(f"{self.model_name}: the base model never ran its layers")
        if isinstance(past_key_values, SpanCache):
            past_key_values.num_tokens += hidden_1TD.shape[1]
        return exchange.outgoing

    def _activate(self, span: BlockSpan) -> None:
        """Make `base.forward` loop over the blocks of `span`."""
        view = self._views.get(span)
        if view is None:
            if not self.span.covers(span):
                raise ConfigError(f"blocks {span} are not within {self.span}, which is loaded here")
            view = self._views[span] = self._view(span)
        if view is not self._current:
            self._install(view)

    def _view(self, span: BlockSpan) -> _View:
        first = span.start - self.span.start
        return _View(
            layers=nn.ModuleList(list(self.layers)[first : first + len(span)]),
            config=_slice_config(self._config, span, self._num_blocks),
            attributes={name: v[span.start : span.end] for name, v in self._lists.items()},
        )

    def _install(self, view: _View) -> None:
        setattr(self.base, self._decoder.layers_attr, view.layers)
        self.base.config = view.config
        vars(self.base).update(view.attributes)
        self._current = view

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module is not self._current.layers[0]:
            return None
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self._exchange.incoming}
        return (self._exchange.incoming, *args[1:]), kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._current.layers[-1]:
            self._exchange.outgoing = output[0] if isinstance(output, tuple) else output

    def _restore_rotary(self) -> None:
        # These modules remember the longest sequence of all sessions.
        for module, attributes, buffers in self._rotary_state:
            module.__dict__.update(attributes)
            for name, value in buffers.items():
                setattr(module, name, value.clone())


_LISTS_PER_LAYER = ("layer_types", "layers_block_type")
"""What configurations call the kinds of their layers."""


class _NoEmbedding(nn.Module):
    """Replaces an embedding table: zeros that broadcast against any hidden states."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        zeros = torch.zeros(1, 1, width, dtype=dtype, device=device)
        self.register_buffer("weight", zeros, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        zeros: torch.Tensor = self.weight
        return zeros


class _PassThrough(nn.Module):
    """Replaces a module whose result is not used: returns the first tensor it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))


def _drop_outside(decoder: Decoder, device: torch.device | str) -> None:
    """Replace modules with weights outside the layers by ones without weights."""
    base = decoder.base
    own = [name for name, _ in base.named_parameters(recurse=False)]
    if own:
        raise ModelError(
            f"{type(base).__name__} keeps weights next to its layers ({', '.join(own)}); "
            "such a family cannot be split into spans"
        )
    for name, child in list(base.named_children()):
        if name == decoder.layers_attr or not has_meta_parameters(child):
            continue
        if isinstance(child, nn.Embedding):
            setattr(base, name, _NoEmbedding(child.embedding_dim, child.weight.dtype, device))
        else:
            setattr(base, name, _PassThrough())


def _lists_per_layer(attributes: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The attributes that hold one value per layer of the whole model."""
    return {
        name: value
        for name, value in attributes.items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }


def _slice_config(config: PretrainedConfig, span: BlockSpan, num_layers: int) -> PretrainedConfig:
    """A copy of the configuration that describes only the span's layers.

    Only the base model gets it. The layers keep the original, which their true indices fit.
    """
    sliced = copy.deepcopy(config)
    per_layer = [
        name
        for name, value in vars(sliced).items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    ]
    for name in per_layer:
        sliced.__dict__[name] = sliced.__dict__[name][span.start : span.end]
    if sliced.is_heterogeneous:
        own = sliced._heterogeneity_spec  # noqa: SLF001 - the setter would compare all layers again
        own.per_layer_overrides = {
            layer - span.start: values
            for layer, values in own.per_layer_overrides.items()
            if layer in span
        }
    _fix_computed_lists(sliced, span, num_layers)
    sliced.num_hidden_layers = len(span)
    # Kept for views of parts of the span: by length alone, a short span's lists per layer could not
    # be distinguished from others.
    sliced.__dict__["planetserve_per_layer"] = per_layer
    return sliced


def _fix_computed_lists(config: PretrainedConfig, span: BlockSpan, num_layers: int) -> None:
    """Give a configuration the span's part of lists that it computes from the number of layers."""
    cls = type(config)
    computed = {
        name: getattr(config, name)
        for name in dir(cls)
        if isinstance(getattr(cls, name, None), property) and name in _LISTS_PER_LAYER
    }
    parts = {
        name: value[span.start : span.end]
        for name, value in computed.items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }
    if parts:
        config.__class__ = type(cls.__name__, (cls,), parts)


def _attention_configs(base: nn.Module, layers: Iterable[nn.Module]) -> list[PretrainedConfig]:
    """The configuration objects that layers, or modules next to them, read their attention from."""
    found = {}
    for module in [*base.modules(), *(part for layer in layers for part in layer.modules())]:
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


_RotaryState = tuple[nn.Module, dict[str, Any], dict[str, torch.Tensor]]


def _rotary_state(base: nn.Module) -> list[_RotaryState]:
    """The rotary modules as built, with their plain attributes and buffers, to restore them."""
    state = []
    for module in base.modules():
        buffers = {name: value.clone() for name, value in module.named_buffers(recurse=False)}
        if any("inv_freq" in name for name in buffers):
            plain = {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            state.append((module, plain, buffers))
    return state
