"""The client's part of a model: its own class with a remote call in the place of its layers.

Embedding, final norm and head are loaded; the list of layers is empty; `remote` computes the output
of the last layer just before the final norm runs. So `generate()`, embedding scales, learned
positions, logit scaling and soft-capping are all the family's own code. The caller handles
sessions, caches and the network: it gives `remote` and `on_call`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from planetserve.errors import ConfigError, ModelError
from planetserve.model.capabilities import check_servable, warn_if_untested
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.decoder import Decoder, find_decoder
from planetserve.model.families import family_of
from planetserve.model.loading import (
    build_on_meta,
    has_meta_parameters,
    load_parameters,
    materialize_buffers,
)
from planetserve.model.partial_outputs import (
    give_states,
    setting,
    switch_off,
    take_wanted_states,
    without_backward,
)
from planetserve.model.text_config import text_config

NO_ATTENTION = "planetserve_remote"
"""Attention implementation of a client half. transformers builds no masks for a name that has an
attention function but no mask function, and there is no layer here that would call it."""

_NO_LAYERS = (
    "the layers run on servers, all of them in one call; session.step() takes hidden states "
    "through them"
)

_TEXT_ONLY = (
    "a distributed model is its language model: give it text only, without images, video or sound"
)

Remote = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states `[batch, tokens, hidden]` through all blocks, in and out."""

OnCall = Callable[[dict[str, Any]], dict[str, Any]]
"""Sees, and may change, the keyword arguments of the base model's `forward` before it runs."""


def load_client_half(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    remote: Remote,
    on_call: OnCall | None = None,
) -> PreTrainedModel:
    """The checkpoint's causal-LM model with `remote` in the place of its layers.

    For each call, `on_call` runs first with the base model's arguments by name (`attention_mask`,
    `position_ids`, `past_key_values`, `use_cache`, ... as far as the family has them), then
    `remote` with the embedded tokens.

    Raises:
        ModelError: the family cannot be served, or weights are missing or damaged.
    """
    check_servable(checkpoint)
    warn_if_untested(checkpoint)
    model = build_on_meta(checkpoint, dtype)
    decoder = find_decoder(model)
    if text_config(model.config) is not model.config:
        _drop_towers(model, decoder, dtype, device)
    load_parameters(model, checkpoint, lambda name: decoder.layer_of(name) is None, dtype, device)
    setattr(decoder.base, decoder.layers_attr, _NoLayers())
    if isinstance(getattr(decoder.base, "rotary_emb", None), nn.Module):
        decoder.base.rotary_emb = _NoRotary(decoder.base.rotary_emb)
    materialize_buffers(model, device)
    AttentionInterface.register(NO_ATTENTION, _no_attention)
    if not family_of(decoder.base.config.model_type).needs_masks:
        for config in (model.config, decoder.base.config):
            config._attn_implementation = NO_ATTENTION  # noqa: SLF001  the setter checks layers
    model.config.name_or_path = checkpoint.pretrained_location[0]
    generation_config = checkpoint.generation_config()
    if generation_config is not None:
        model.generation_config = generation_config
    # Some checkpoints switch the cache off; then the whole text would be sent for every token.
    model.config.use_cache = model.generation_config.use_cache = True
    switch_off(model.config)
    _hook(decoder, remote, on_call)
    return model


def _drop_towers(
    model: PreTrainedModel, decoder: Decoder, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Replace the parts of a multimodal model besides its language model and its head."""
    head = model.get_output_embeddings()
    owner: nn.Module = model
    for part in decoder.base_path.split(".") if decoder.base_path else ():
        for name, child in list(owner.named_children()):
            if name != part and child is not head and has_meta_parameters(child):
                setattr(owner, name, _NoTower(dtype, torch.device(device)))
        owner = getattr(owner, part)


class _NoTower(nn.Module):
    """Replaces a module that makes embeddings of images or sounds."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.dtype = dtype
        self.device = device

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(_TEXT_ONLY)


class _NoLayers(nn.ModuleList):
    """An empty list of layers, over which a model's own code loops."""

    @override
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.start is None:
            return self
        raise ConfigError(_NO_LAYERS)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(_NO_LAYERS)


class _NoRotary(nn.Module):
    """Replaces a rotary embedding, which only layers would read.

    A base model reads only its numbers (how many planes of positions there are).
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        tensors_and_config = (torch.Tensor, nn.Module, PretrainedConfig)
        for name, value in vars(rotary).items():
            if not name.startswith("_") and not isinstance(value, tensors_and_config):
                setattr(self, name, value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return x, x


@dataclasses.dataclass(slots=True)
class _Pass:
    """One running call of the base model."""

    norm_calls_left: int
    """Calls of the final norm before the layers."""
    wants_states: bool
    entered_BTD: torch.Tensor | None = None


def _hook(decoder: Decoder, remote: Remote, on_call: OnCall | None) -> None:
    # The hooks hold no module, because a copy of the model has the same hooks.
    skipped = family_of(decoder.base.config.model_type).norm_calls_before_layers
    names = decoder.parameter_names
    # Threads share the modules and run calls of their own through them.
    thread = threading.local()

    def before_decoder(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = dict(zip(names, args, strict=False)) | kwargs if args else kwargs
        if bound.get("use_cache") is None and setting(module.config, "use_cache") is False:
            bound["use_cache"] = False
        thread.now = _Pass(skipped, take_wanted_states(module.config, bound))
        return (), bound if on_call is None else on_call(bound)

    def replace_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        now: _Pass | None = getattr(thread, "now", None)
        if now is None:
            return None
        now.norm_calls_left -= 1
        if now.norm_calls_left >= 0:
            return None
        hidden_BTD, output_BTD = args[0], remote(args[0])
        if now.wants_states:
            now.entered_BTD = hidden_BTD
        if torch.is_grad_enabled() and hidden_BTD.requires_grad:
            output_BTD = without_backward(hidden_BTD, output_BTD)
        return (output_BTD, *args[1:])

    def end_call(module: nn.Module, _args: Any, output: Any) -> None:
        now: _Pass | None = getattr(thread, "now", None)
        thread.now = None
        if output is not None and now is not None and now.entered_BTD is not None:
            num_blocks = text_config(module.config).num_hidden_layers
            give_states(output, now.entered_BTD, num_blocks)

    getattr(decoder.base, decoder.final_norm_attr).register_forward_pre_hook(replace_input)
    decoder.base.register_forward_pre_hook(before_decoder, with_kwargs=True)
    decoder.base.register_forward_hook(end_call, always_call=True)


def _no_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    raise ModelError("a client half has no layers, so nothing may call its attention")
