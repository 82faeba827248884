"""Keyword arguments of `from_pretrained` that users know from Petals and transformers.

An argument that cannot change the output is accepted with one warning that names it. An argument
that cannot be honoured is refused with what to do instead, unless its value is empty.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from planetserve.config import ClientConfig
from planetserve.config.old_names import old_names_of
from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_HARMLESS = frozenset(
    """
    allow_all_kernels attn_implementation chunked_forward_step code_revision device_mesh
    disable_mmap distributed_config experts_implementation _fast_init force_download
    ignore_mismatched_sizes kernel_config low_cpu_mem_usage max_memory mirror offload_buffers
    offload_folder offload_state_dict proxies resume_download tp_plan tp_size trust_remote_code
    use_chunked_forward use_flash_attention_2 use_kernels use_safetensors weights_only
    """.split()
)
_AS_IT_IS = "the swarm serves the model as it is"
_QUANTISED = "servers choose how they hold their weights (--quant_type), the client's half is whole"
_ONE_FORMAT = "only the safetensors files of a model's own folder are read"
_REFUSED: Mapping[str, str] = {
    "active_adapter": _AS_IT_IS,
    "adapter_kwargs": _AS_IT_IS,
    "adapter_name": _AS_IT_IS,
    "from_flax": _ONE_FORMAT,
    "from_tf": _ONE_FORMAT,
    "gguf_file": _ONE_FORMAT,
    "key_mapping": _AS_IT_IS,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "output_attentions": "attention weights stay on the servers",
    "output_loading_info": "a model is returned, and nothing is missing in it",
    "pre_seq_len": _AS_IT_IS,
    "quantization_config": _QUANTISED,
    "state_dict": "load it into the client's half: model.load_state_dict(...)",
    "subfolder": _ONE_FORMAT,
    "tuning_mode": _AS_IT_IS,
    "variant": _ONE_FORMAT,
}
_CLIENTS_OWN = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)
"""Fields of a model's configuration that only the client's half reads."""
_VOLATILE = frozenset(
    "_name_or_path architectures attn_implementation _attn_implementation _attn_implementation_"
    "internal dtype id2label label2id torch_dtype "
    "transformers_version".split()
)
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def drop_inapplicable_options(options: dict[str, Any]) -> None:
    """Remove options without effect from `options`, with one warning.

    Raises:
        ConfigError: an option cannot be honoured.
    """
    if options.get("use_safetensors") is False:
        raise ConfigError(f"use_safetensors=False is not possible: {_ONE_FORMAT}")
    for name, why in _REFUSED.items():
        if options.pop(name, None):
            raise ConfigError(f"{name} is not supported: {why}")
    given = {name: options.pop(name) for name in sorted(_HARMLESS & options.keys())}
    named = [name for name, value in given.items() if value not in (None, False)]
    if named:
        logger.warning("%s: no effect on a distributed model", ", ".join(named))


def open_checkpoint(model: str | os.PathLike[str] | None, options: dict[str, Any]) -> Checkpoint:
    """Open the checkpoint that `model` and the hub's arguments among `options` name.

    Raises:
        ModelError: there is no such checkpoint.
    """
    named = options.pop("pretrained_model_name_or_path", None)
    hub = {name: options.pop(name, None) for name in ("revision", "token", "cache_dir")}
    hub["token"] = options.pop("use_auth_token", None) or hub["token"]
    local_files_only = bool(options.pop("local_files_only", False))
    return Checkpoint.open(
        named if model is None else model, **hub, local_files_only=local_files_only
    )


def parse_device(device_map: Any) -> torch.device:
    """The device of the client's half.

    Raises:
        ConfigError: there is no such device, or several are named.
    """
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1:
            raise ConfigError("device_map: the client's half is in one place; name one device")
        device_map = next(iter(device_map.values()))
    if device_map in _SPREAD:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_map)
        torch.empty(1, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device_map={device_map!r}: no such device here; leave it out"
        ) from error
    if device.type == "meta":
        raise ConfigError("device_map='meta' would leave the client's half without weights")
    return device


def dtype_text(dtype: Any, torch_dtype: Any) -> str:
    """The name of the dtype given as `dtype` or by its older name `torch_dtype`.

    Raises:
        ConfigError: the two contradict each other.
    """
    names = {_dtype_name(value) for value in (dtype, torch_dtype) if value is not None}
    if len(names) > 1:
        raise ConfigError(f"dtype={dtype} and torch_dtype={torch_dtype} contradict each other")
    return names.pop() if names else "auto"


def _dtype_name(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    known = getattr(torch, name, None)  # "half" is "float16"
    return str(known).removeprefix("torch.") if isinstance(known, torch.dtype) else name


class OwnSettings:
    """Settings of the client's half that differ from the checkpoint's configuration.

    Args:
        checkpoint: the checkpoint, with the configuration that servers use.
        config: the Hugging Face configuration that the caller passed, if any.
        options: keyword arguments; fields of the configuration are taken out of them, and options
            of the client that `config` holds are put in.

    Raises:
        ConfigError: a setting would change what servers compute.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: PretrainedConfig | None, options: dict[str, Any]
    ):
        generation_config = options.pop("generation_config", None)
        if not isinstance(generation_config, GenerationConfig | None):
            raise ConfigError("generation_config must be a GenerationConfig of transformers")
        self._generation_config: GenerationConfig | None = generation_config
        own = checkpoint.config.to_dict()
        passed = {} if config is None else config.to_dict()
        # Petals' configurations hold the client's options too.
        fields = [field.name for field in dataclasses.fields(ClientConfig)]
        for name in (*fields, *old_names_of(ClientConfig)):
            if name in passed and name not in own:
                options.setdefault(name, passed.pop(name))
        asked = {name: options.pop(name) for name in [*options] if name in {*own, *_CLIENTS_OWN}}
        changed = {
            name: value
            for name, value in (passed | asked).items()
            if name not in _VOLATILE and value != own.get(name)
        }
        self._asked = {name: value for name, value in asked.items() if name in _CLIENTS_OWN}
        self._config = {name: changed.pop(name) for name in _CLIENTS_OWN if name in changed}
        if changed:
            raise ConfigError(
                f"{sorted(changed)[0]} differs from the model's own configuration, by which all "
                "servers run it; leave it out"
            )

    def apply(self, model: Any) -> None:
        """Set them on the loaded model."""
        if self._generation_config is not None:
            model.generation_config = self._generation_config
        for name, value in (self._config | self._asked).items():
            setattr(model.config, name, value)
        for name, value in self._asked.items():
            setattr(model.generation_config, name, value)
