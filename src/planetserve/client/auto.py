"""`from_pretrained` for distributed models: the checkpoint's own class, its layers in the swarm.

Loads the embedding, the final norm and the head; everything between runs on servers found through
`initial_peers`, but for `local_blocks`. Keyword arguments are either Hugging Face's (`torch_dtype`,
`revision`, `token`, `cache_dir`) or fields of `ClientConfig`.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedModel

from planetserve.client.block_ranges import split_blocks
from planetserve.client.generation import DistributedMixin, SwarmMixin
from planetserve.client.local_blocks import LocalEnds
from planetserve.client.planning import ModelFacts
from planetserve.client.remote_blocks import RemoteBlocks
from planetserve.client.runtime import ClientRuntime
from planetserve.client.shared_head import share_head
from planetserve.config import ClientConfig, from_mapping
from planetserve.errors import ConfigError
from planetserve.model.capabilities import check_servable
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.model.client_half import load_client_half
from planetserve.model.linear import convert_head

_IGNORED = ("low_cpu_mem_usage",)
"""Arguments that people pass out of habit and that could not change anything here."""
_UNSUPPORTED = ("active_adapter", "tuning_mode", "pre_seq_len")
"""Options of Petals that may be passed empty, and are refused when they ask for something."""


class AutoDistributedModelForCausalLM:
    """Loads causal language models whose decoder layers are served by a swarm."""

    model_type: ClassVar[str | None] = None
    """The only Hugging Face model type this class loads; None loads any."""
    has_head: ClassVar[bool] = True

    def __init__(self) -> None:
        raise ConfigError(f"use {type(self).__name__}.from_pretrained(MODEL, initial_peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        config: ClientConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        **options: Any,
    ) -> Any:
        """Load the client's half of `model` and join the swarm.

        Args:
            model: hub id, local folder, or "demo".
            config: all client options at once, instead of `options`.
            torch_dtype: dtype of the local half and of the activations; "auto" (the default) is
                the checkpoint's own. `dtype` is the same.
            revision: branch, tag or commit on the hub.
            token: access token for the hub.
            cache_dir: where downloads are kept.
            **options: fields of `ClientConfig`, above all `initial_peers`.

        Returns:
            A model of the checkpoint's own Hugging Face class, with `chain`, `inference_session`
            and `close` besides. Use it in a `with` block or call `close()`.

        Raises:
            ConfigError: an unknown option, model or dtype.
            ModelMismatchError: the swarm serves another revision of this model.
            PeerUnreachable: no initial peer answers.
        """
        for name in _IGNORED:
            options.pop(name, None)
        for name in _UNSUPPORTED:
            if options.pop(name, None):
                raise ConfigError(f"{name} is not supported: the swarm serves the model as it is")
        if "use_auth_token" in options:
            token = options.pop("use_auth_token") or token
        client_config = _client_config(config, options)
        checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
        _check_type(checkpoint, cls.model_type, cls.__name__)
        check_servable(checkpoint)
        wanted = torch_dtype if torch_dtype is not None else dtype
        chosen = parse_dtype(_dtype_text(wanted), checkpoint, torch.device("cpu"))
        return _load(checkpoint, chosen, client_config, has_head=cls.has_head)


class AutoDistributedModel(AutoDistributedModelForCausalLM):
    """Loads models without their head: a call returns `last_hidden_state` after the final norm."""

    has_head = False


class AutoDistributedConfig:
    """Loads a model's configuration, as Hugging Face's `AutoConfig` does."""

    model_type: ClassVar[str | None] = None
    """The only Hugging Face model type this class loads; None loads any."""

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> Any:
        """The Hugging Face configuration of `model` (hub id, local folder, or "demo").

        Raises:
            ModelError: no such model.
        """
        known = {name: options.pop(name, None) for name in ("revision", "token", "cache_dir")}
        if options:
            raise ConfigError(f"unknown option {sorted(options)[0]!r} for a model configuration")
        checkpoint = Checkpoint.open(model, **known)
        _check_type(checkpoint, cls.model_type, cls.__name__)
        found: AutoConfig = checkpoint.config
        return found


def _client_config(config: ClientConfig | None, options: dict[str, Any]) -> ClientConfig:
    if config is not None:
        if options:
            raise ConfigError(f"give either config= or options such as {sorted(options)[0]!r}")
        return config
    made = from_mapping(ClientConfig, options)
    if not made.initial_peers:
        raise ConfigError(
            "no initial_peers given; pass the addresses that a server or run_dht printed, "
            "initial_peers=['/ip4/.../tcp/.../p2p/...']"
        )
    return made


def _dtype_text(wanted: torch.dtype | str | None) -> str:
    if wanted is None:
        return "auto"
    return str(wanted).removeprefix("torch.")


def _check_type(checkpoint: Checkpoint, wanted: str | None, name: str) -> None:
    if wanted is not None and checkpoint.config.model_type != wanted:
        raise ConfigError(
            f"{name} loads {wanted} models, {checkpoint.name} is of type "
            f"{checkpoint.config.model_type}; use AutoDistributedModelForCausalLM"
        )


def _load(
    checkpoint: Checkpoint, dtype: torch.dtype, config: ClientConfig, *, has_head: bool
) -> Any:
    facts = ModelFacts.of(checkpoint, dtype)
    split = split_blocks(config, checkpoint.num_blocks)
    local = None if config.local_blocks is None else LocalEnds.load(checkpoint, split, dtype)
    runtime = ClientRuntime(config, facts, local)
    try:
        blocks = RemoteBlocks(lambda tokens: runtime.new_session(lease_tokens=tokens), runtime.keep)
        model = load_client_half(
            checkpoint, dtype, torch.device("cpu"), remote=blocks, on_call=blocks.on_call
        )
        if has_head:
            convert_head(model)
            share_head(model)
        else:
            model = model.base_model
        _attach(model, blocks, runtime, DistributedMixin if has_head else SwarmMixin)
    except BaseException:
        runtime.close()
        raise
    return model


def _attach(
    model: PreTrainedModel, blocks: RemoteBlocks, runtime: ClientRuntime, mixin: type
) -> None:
    """Give the loaded half its distributed methods."""
    base = type(model)
    model.__class__ = type(f"Distributed{base.__name__}", (mixin, base), {})
    model.runtime = runtime

    def note_logits(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        runtime.check_process()
        blocks.on_logits(kwargs.get("logits_to_keep", 0))

    model.register_forward_pre_hook(note_logits, with_kwargs=True)
    for module in {model, model.base_model}:
        module.register_forward_hook(lambda *_: blocks.forget(), always_call=True)
    # A model that is forgotten must not leave its thread and libp2p daemon behind.
    weakref.finalize(model, runtime.close)
