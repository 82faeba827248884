"""The part of a configuration that describes the language model, and what its layers share."""

from __future__ import annotations

from transformers import PretrainedConfig


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's own configuration, however deep a multimodal one nests it."""
    inner = config.get_text_config(decoder=True)
    # For an older encoder-decoder model it is a changed copy, a new one each time.
    while type(inner) is not type(config):
        config, inner = inner, inner.get_text_config(decoder=True)
    return config


def shares_kv_heads(config: PretrainedConfig) -> bool:
    """Whether some layer has fewer heads of keys and values than of queries."""
    text = text_config(config)
    # Where these are attributes of each layer, reading them from the common configuration raises.
    layers = text.per_layer_config if text.is_heterogeneous else [text]
    for layer in layers:
        num_heads = getattr(layer, "num_attention_heads", 0)  # Mamba has none
        if (getattr(layer, "num_key_value_heads", None) or num_heads) < num_heads:
            return True
    return False
