"""`from_pretrained` for distributed models: the checkpoint's own class, its layers in the swarm.

Loads the embedding, the final norm and the head; everything between runs on servers found through
`initial_peers`, but for `local_blocks`. Keyword arguments are either Hugging Face's (`dtype`,
`revision`, `token`, `cache_dir`) or fields of `ClientConfig`; `options` has what else is accepted.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from planetserve.client.hf.batched_lm_head import install_batched_lm_head
from planetserve.client.hf.generation import DistributedMixin, SwarmMixin
from planetserve.client.hf.local_blocks import LocalEnds
from planetserve.client.hf.module import ModuleMixin, RuntimeHandle
from planetserve.client.hf.options import (
    OwnSettings,
    drop_inapplicable_options,
    dtype_text,
    open_checkpoint,
    parse_device,
)
from planetserve.client.hf.remote_blocks import RemoteBlocks
from planetserve.client.planning.block_ranges import split_blocks
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.client.runtime import ClientRuntime
from planetserve.config import ClientConfig, check_mapping, from_mapping
from planetserve.errors import ConfigError
from planetserve.model.capabilities import check_servable
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.model.client_half import load_client_half


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
        model: str | os.PathLike[str] | None = None,
        *,
        config: ClientConfig | PretrainedConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """Load the client's half of `model` and join the swarm.

        Args:
            model: hub id, local folder, or "demo"; `pretrained_model_name_or_path` is the same.
            config: all client options at once, instead of `options`; or the model's own
                configuration.
            torch_dtype: dtype of the local half and of the activations; "auto" (the default) is
                the checkpoint's own. `dtype` is the same.
            device_map: the device of the local half, the CPU by default.
            **options: fields of `ClientConfig`, above all `initial_peers`; for the hub `revision`,
                `token`, `cache_dir` and `local_files_only`; `generation_config`. Other arguments
                of Hugging Face's `from_pretrained` are accepted where they are harmless.

        Returns:
            A model of the checkpoint's own Hugging Face class, with `chain`, `inference_session`
            and `close` besides. Use it in a `with` block or call `close()`.

        Raises:
            ConfigError: an unknown option, model or dtype.
            ModelMismatchError: the swarm serves another revision of this model.
            PeerUnreachable: no initial peer answers.
        """
        drop_inapplicable_options(options)
        if not isinstance(config, ClientConfig | PretrainedConfig | None):
            raise ConfigError("config is a ClientConfig, or the model's own configuration")
        device = parse_device(device_map)
        checkpoint = open_checkpoint(model, options)
        hf_config = config if isinstance(config, PretrainedConfig) else None
        own = OwnSettings(checkpoint, hf_config, options)
        client_config = _client_config(None if hf_config else config, options)
        _check_type(checkpoint, cls.model_type, cls.__name__)
        check_servable(checkpoint)
        chosen = parse_dtype(dtype_text(dtype, torch_dtype), checkpoint, device)
        loaded = _load(checkpoint, chosen, device, client_config, has_head=cls.has_head)
        try:
            own.apply(loaded)
        except BaseException:
            loaded.close()
            raise
        return loaded


class AutoDistributedModel(AutoDistributedModelForCausalLM):
    """Loads models without their head: a call returns `last_hidden_state` after the final norm."""

    has_head = False


class AutoDistributedConfig:
    """Loads a model's configuration, as Hugging Face's `AutoConfig` does."""

    model_type: ClassVar[str | None] = None
    """The only Hugging Face model type this class loads; None loads any."""

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """The Hugging Face configuration of `model` (hub id, local folder, or "demo").

        Raises:
            ModelError: no such model.
        """
        drop_inapplicable_options(options)
        checkpoint = open_checkpoint(model, options)
        OwnSettings(checkpoint, None, options)
        # As Petals' configurations do, it holds options of the client for whoever is given it.
        for name, value in check_mapping(ClientConfig, options).items():
            setattr(checkpoint.config, name, value)
        _check_type(checkpoint, cls.model_type, cls.__name__)
        found: AutoConfig = checkpoint.config
        return found


def _client_config(config: ClientConfig | None, options: dict[str, Any]) -> ClientConfig:
    if config is not None:
        if options:
            raise ConfigError(f"give either config= or options such as {sorted(options)[0]!r}")
        return config
    if options.get("initial_peers", ()) is None:
        del options["initial_peers"]
    made = from_mapping(ClientConfig, options)
    if not made.initial_peers:
        raise ConfigError(
            "no initial_peers given; pass the addresses that a server or run_dht printed, "
            "initial_peers=['/ip4/.../tcp/.../p2p/...']"
        )
    return made


def _check_type(checkpoint: Checkpoint, wanted: str | None, name: str) -> None:
    if wanted is not None and checkpoint.config.model_type != wanted:
        raise ConfigError(
            f"{name} loads {wanted} models, {checkpoint.name} is of type "
            f"{checkpoint.config.model_type}; use AutoDistributedModelForCausalLM"
        )


def _load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    config: ClientConfig,
    *,
    has_head: bool,
) -> Any:
    facts = ModelFacts.of(checkpoint, dtype)
    split = split_blocks(config, checkpoint.num_blocks)
    local = None if config.local_blocks is None else LocalEnds.load(checkpoint, split, dtype)
    runtime = ClientRuntime(config, facts, local)
    try:
        blocks = RemoteBlocks(lambda tokens: runtime.new_session(lease_tokens=tokens), runtime.keep)
        model = load_client_half(checkpoint, dtype, device, remote=blocks, on_call=blocks.on_call)
        if has_head:
            install_batched_lm_head(model)
        else:
            model = model.base_model
        attach(model, blocks, runtime, DistributedMixin if has_head else SwarmMixin)
    except BaseException:
        runtime.close()
        raise
    return model


def attach(
    model: PreTrainedModel, blocks: RemoteBlocks, runtime: ClientRuntime, mixin: type
) -> None:
    """Give the loaded half its distributed methods."""
    base = type(model)
    names = tuple(inspect.signature(model.forward).parameters)
    # Servers roll back the states of recurrent layers, which transformers cannot.
    own = {"remote_blocks": blocks, "forward_names": names, "_is_stateful": False}
    # Of the same name: transformers knows by it what a model can do.
    model.__class__ = type(base.__name__, (mixin, ModuleMixin, base), own)
    for inner in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if inner is not model:
            inner.__class__ = type(type(inner).__name__, (ModuleMixin, type(inner)), own)
    model.runtime = runtime
    # A model that is forgotten must not leave its thread and libp2p daemon behind.
    model.runtime_handle = RuntimeHandle(runtime)
