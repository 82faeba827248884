"""Tiny configurations of multimodal models: a language model as small as the others, and towers.

Which parts a configuration has, and under which names, is read off the class's own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from planetserve.model.text_config import text_config

_TOWER_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "n_embd", "hidden_dim", "width"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "ffn_dim", "encoder_ffn_dim", "n_state"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "n_layer"), 1),
    **dict.fromkeys(("decoder_layers", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head"), 2),
    **dict.fromkeys(("attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "output_dim", "text_hidden_size"), 32),
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), [0]),
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "num_queries": 4,
    "position_embedding_size": 4,
    "num_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
"""Positions in three planes, for heads of 8 dimensions."""

_MROPE_TEXTS = frozenset(
    """
    glm4v_text glm_ocr_text hunyuan_vl_text paddleocr_vl_text qwen2_5_omni_text qwen2_5_vl_text
    qwen2_vl_text qwen3_vl_moe_text qwen3_vl_text
    """.split()
)


def multimodal_config(
    model_type: str, sizes: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """The configuration of a tiny multimodal model.

    Args:
        model_type: of the whole.
        sizes: field -> value of the language model, which takes those it knows.
        overrides: of the whole; those of a part are a mapping under its name.
    """
    default = AutoConfig.for_model(model_type)
    values = _values(default, text_config(default), sizes)
    _merge(values, overrides)
    return AutoConfig.for_model(model_type, **values)


def is_multimodal(model_type: str) -> bool:
    """Whether its language model has a configuration of its own."""
    default = AutoConfig.for_model(model_type)
    return text_config(default) is not default


def has_field(config: PretrainedConfig, name: str) -> bool:
    """Whether `name` is a value that can be set."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    # Where it is an attribute of each layer, the configuration itself refuses to be asked.
    return name in (config.per_layer_attributes or ()) or hasattr(config, name)


def _values(
    config: PretrainedConfig, text: PretrainedConfig, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    parts = {n: part for n, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    values: dict[str, Any] = {
        name: {"model_type": part.model_type, **_values(part, text, sizes)}
        for name, part in parts.items()
    }
    if config is not text:
        return values if parts else _known(config, _TOWER_SIZES)
    values |= _known(config, sizes)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if kinds:
        values["layer_types"] = (kinds * 4)[: values["num_hidden_layers"]]
    if config.model_type in _MROPE_TEXTS:
        values["rope_parameters"] = MROPE
    return values


def _known(config: PretrainedConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if has_field(config, name)}


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value
