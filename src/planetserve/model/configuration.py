"""The configuration of a checkpoint as transformers builds it, without keys that say how to run it.

A `config.json` is untrusted text. transformers makes every key of it an attribute, and some of
these make it download code: an attention implementation can be the name of a repository of compiled
kernels. Such keys say how to run a model and not what it is, so both ends leave them out and make
their own choice.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from planetserve.errors import ModelError, one_line

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000
"""Maximum number of layers. Lists per layer are built from it before anything else is checked."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_LEFT_OUT = frozenset(
    {
        # Implementations, which may be names of repositories.
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
        "use_kernels", "kernel_config", "allow_all_kernels", "fusion_config",
        # Code and other models.
        "auto_map", "custom_generate", "custom_pipelines", "trust_remote_code", "backbone",
        "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone", "gguf_file",
        # How transformers itself would spread the model.
        "distributed_config", "device_map", "base_model_tp_plan", "base_model_pp_plan",
        "base_model_ep_plan", "base_model_fsdp_plan",
        # Other names for attributes, under which any of these could come back.
        "attribute_map", "sub_configs_defaults", "sub_configs",
        # Of classifiers; transformers makes a string for each label.
        "num_labels", "id2label", "label2id",
        # Where the checkpoint was saved.
        "name_or_path", "_name_or_path", "_commit_hash",
    }
)  # fmt: skip

_NOT_SAVED = frozenset({"compile_config", "continuous_batching_config"})
"""Settings of generation that say how to run a model."""

_GENERATION_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams",
                     "num_return_sequences", "top_k", "no_repeat_ngram_size"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty",
                     "length_penalty"), (int, float)),
}  # fmt: skip

_SILENTLY_LEFT_OUT = frozenset(
    {"auto_map", "num_labels", "id2label", "label2id", "name_or_path", "_name_or_path",
     "_commit_hash"}
)  # fmt: skip
"""Keys that are common in published checkpoints, and that have no effect without remote code."""


OTHER_NAMES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types of checkpoints that transformers does not know -> the type to use for them."""

_UNREADABLE = (  # Families check their values in code of their own.
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    StrictDataclassError,
)


def read_config(name: str, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that the contents of a `config.json` describe.

    Args:
        name: of the checkpoint, for messages.
        raw: the contents.

    Raises:
        ModelError: transformers cannot read it, or it describes no model that is served here.
    """
    model_type = raw.get("model_type")
    if model_type is None:
        raise ModelError(f"{name}: config.json names no model_type{_hint(raw)}")
    if not isinstance(model_type, str):
        raise ModelError(f"{name}: config.json gives no name as model_type")
    if "configuration_files" in raw:
        raise ModelError(
            f"{name}: config.json points to other files by version of transformers; save the one "
            "for yours as config.json"
        )
    if "quantization" in raw:
        raise ModelError(
            f"{name} cannot be served: its weights are stored quantised, in the format of MLX; "
            "give the checkpoint that it was made from, or what `mlx_lm.convert --dequantize` makes"
        )
    reason = _refused_by_type(model_type, raw)
    if reason is not None:
        raise ModelError(f"{name} ({model_type}) cannot be served: {reason}")
    cleaned = _without_instructions(name, raw)
    cleaned["model_type"] = OTHER_NAMES.get(model_type, model_type)
    _check_layer_count(name, cleaned)
    try:
        # Public, and exactly what `from_pretrained` makes of these values, whatever it corrects.
        with tempfile.TemporaryDirectory(prefix="planetserve-config-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(cleaned), encoding="utf-8")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNREADABLE as error:
        reason = one_line(error, 300) or type(error).__name__
        raise ModelError(
            f"{name}: transformers {transformers.__version__} cannot read the configuration "
            f"of model type {model_type!r}: {reason}"
        ) from error
    return config


def read_generation_config(name: str, raw: Mapping[str, Any]) -> GenerationConfig:
    """The settings that the contents of a `generation_config.json` describe, as far as transformers
    knows them: any other key would become an attribute, or take the place of a method.

    Raises:
        ModelError: transformers cannot use them.
    """
    known = vars(GenerationConfig()).keys() - _NOT_SAVED
    values = {key: raw[key] for key in known & raw.keys()}
    for key, types in _GENERATION_TYPES.items():
        value = values.get(key)
        if value is not None and (type(value) not in types or not math.isfinite(value)):
            raise ModelError(f"{name}: generation_config.json sets {key} to {value!r}, no number")
    try:
        return GenerationConfig.from_dict(values)
    except _UNREADABLE as error:
        reason = one_line(error, 300) or type(error).__name__
        raise ModelError(f"{name}: generation_config.json is not usable: {reason}") from error


def _hint(raw: Mapping[str, Any]) -> str:
    if "base_model_name_or_path" in raw:
        return "; this is an adapter's: merge it into its base model first"
    if "dim" in raw and "n_layers" in raw:
        return "; this is a checkpoint in its maker's own layout: give the one in transformers'"
    return "; give a model saved by save_pretrained"


def _refused_by_type(model_type: str, raw: Mapping[str, Any]) -> str | None:
    """Why no model of this type can be served, by its name alone.

    Checked before the configuration is built, because building some types accesses the hub.
    """
    known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, OTHER_NAMES)
    if any(model_type in types for types in known):
        return None
    if model_type not in CONFIG_MAPPING_NAMES:
        code = ", and code from a model's repository is never run" if "auto_map" in raw else ""
        return (
            f"transformers {transformers.__version__} has no model of this type{code}; give a "
            "checkpoint of a type that it has, or install a newer transformers if that has it"
        )
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "it is an encoder-decoder model, and only decoder-only models are"
    return "transformers has no model of this type that generates text"


def _without_instructions(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that say how to run the model, at any depth."""
    left_out: dict[str, Any] = {}

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {}
            for key, item in value.items():
                if key in _LEFT_OUT:
                    left_out[key] = item
                else:
                    kept[key] = clean(item)
            return kept
        return [clean(item) for item in value] if isinstance(value, list) else value

    cleaned: dict[str, Any] = clean(dict(raw))
    told = {key: item for key, item in left_out.items() if item is not None}
    for key in sorted(told.keys() - _SILENTLY_LEFT_OUT):
        logger.warning("%s: config.json sets %s, which has no effect here", name, key)
    return cleaned


def _check_layer_count(name: str, config: Mapping[str, Any]) -> None:
    for values in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _LAYER_COUNTS:
            count = values.get(key)
            if isinstance(count, int | float) and not 0 < count <= _MOST_LAYERS:
                raise ModelError(f"{name}: config.json says {key} {count}, which no model has")
