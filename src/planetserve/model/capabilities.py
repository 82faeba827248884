"""Whether, and how, the layers of a checkpoint can be served on several machines, by its
configuration.

Computed from the configuration alone, so it is cheap, and both ends get the same result:
`check_servable` refuses in one line what would otherwise give wrong output. Reasons that cannot be
computed are declared in `families`.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.families import TESTED, family_of
from planetserve.model.text_config import text_config
from planetserve.model.weights import check_method

logger = logging.getLogger(__name__)


def check_servable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose layers cannot be spread over machines.

    Raises:
        ModelError: with the reason.
    """
    reason = refusal(checkpoint.config)
    if reason is not None:
        raise ModelError(
            f"{checkpoint.name} ({checkpoint.config.model_type}) cannot be served: {reason}"
        )
    check_method(checkpoint.name, checkpoint.quantization() or {})


def warn_if_untested(checkpoint: Checkpoint) -> None:
    """Log a warning if the project's tests do not compare this family's output with the local
    model's."""
    model_type = checkpoint.config.model_type
    if model_type not in TESTED:
        logger.warning(
            "%s: model type %s is not among the tested ones (docs/families.md); compare its output "
            "with a local run before relying on it",
            checkpoint.name,
            model_type,
        )


def refusal(config: PretrainedConfig) -> str | None:
    """Why a model of this configuration cannot be served, or None if it can."""
    text = text_config(config)
    declared = family_of(config.model_type).refused or family_of(text.model_type).refused
    if declared is not None:
        return declared
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return "it is an encoder-decoder model, and only decoder-only models are"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "it is an encoder, which fills in masked words, and only decoder-only models are"
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    if not any(config.model_type in kind for kind in kinds):
        return "transformers has no model of this type that generates text"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values across blocks"
    if getattr(text, "hidden_size_per_layer_input", 0):
        return "its layers read token embeddings of their own besides the hidden states"
    return _cache_refusal(text)


def has_recurrent_layers(config: PretrainedConfig) -> bool:
    """Whether any layer keeps a recurrent or convolutional state (Mamba, linear attention)."""
    kinds = _cache_kinds(config) or []
    return any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds)


def _cache_refusal(config: PretrainedConfig) -> str | None:
    kinds = _cache_kinds(config)
    if kinds is None:
        return "transformers has no cache of plain keys and values for its layers"
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        return "some of its layers have no keys and values of their own"
    special = [kind for kind in kinds if kind not in _KNOWN_LAYERS]
    # By name: older transformers 5 releases have no such class to import.
    special = [kind for kind in special if kind.__name__ != "DummyLayer"]
    if special:
        return f"its layers cache more than keys and values ({special[0].__name__})"
    if has_recurrent_layers(config) and constant_rotary_length(config) is not None:
        return "its layers keep states, and its rotary frequencies depend on the length of a text"
    return None


_KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def _cache_kinds(config: PretrainedConfig) -> list[type] | None:
    """The cache layer class transformers would use for each layer; None if it has none."""
    try:
        return [type(layer) for layer in DynamicCache(config=config).layers]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def constant_rotary_length(config: PretrainedConfig) -> int | None:
    """The length up to which rotary frequencies are constant; None if they always are.

    In longer passes they depend on the longest position (dynamic NTK, longrope).
    """
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    lengths: list[int] = []
    for part in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        rope_type = str(part.get("rope_type", "default"))
        if rope_type == "longrope":
            lengths.append(part["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)
