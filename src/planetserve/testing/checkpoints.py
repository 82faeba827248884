"""Tiny random checkpoints of many model families, written to a folder as `save_pretrained` would.

A tiny model is a real one: the family's own class and configuration with small sizes, and weights
random and large enough that a wrong layer, a lost position or a shifted mask changes the logits
visibly. `SERVABLE_FAMILIES` and `REFUSED_FAMILIES` name what is tested; several names can be
variants of one model type. No network is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from planetserve.errors import ConfigError

VOCAB_SIZE = 96
NUM_BLOCKS = 4
WINDOW = 5
"""Sliding window of the families that have one: shorter than any sequence worth testing."""

# What a field is called differs between families; a family takes those it knows.
_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_8 = {"head_dim": 8}
_MHA = {"num_key_value_heads": 4}
_MLA = {
    **_MHA,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_MLA_MOE = {**_MLA, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 8,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """A model type and what its tiny configuration sets besides the common sizes."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    """Words that the reason for refusing it contains; None for a family that can be served."""


def _servable() -> dict[str, TinyFamily]:
    plain = (
        "afmoe apertus arcee biogpt bitnet bloom codegen cohere cohere2 cwm diffllama doge "
        "ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe "
        "gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe "
        "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jetmoe llama "
        "llama4_text minimax_m2 ministral ministral3 mistral mixtral mpt nanochat nemotron olmo "
        "olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss "
        "smollm3 solar_open stablelm starcoder2 vaultgemma xglm"
    )
    found = {name: TinyFamily(name, _OVERRIDES.get(name, {})) for name in plain.split()}
    found |= {name: TinyFamily(model_type, extra) for name, (model_type, extra) in _VARIANTS.items()}
    return found


_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 4},
    "gemma": {**_HEAD_8, "num_key_value_heads": 1},
    "gemma2": {**_HEAD_8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_HEAD_8, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    "gpt_neo": {
        "num_heads": 4,
        "attention_types": [[["global", "local"], NUM_BLOCKS // 2]],
        "window_size": WINDOW,
    },
    "gpt_oss": {**_HEAD_8},
}

_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama_mha": ("llama", _MHA),
    "llama_mqa_tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_odd_heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_llama3_rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_yarn_rope": ("llama", {"rope_parameters": _YARN_ROPE}),
    "llama_dynamic_rope": (
        "llama", {"rope_parameters": _DYNAMIC_ROPE, "max_position_embeddings": 8},
    ),
    "phi3_longrope": ("phi3", {"rope_parameters": _LONG_ROPE}),
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "falcon_mqa": ("falcon", {"alibi": False, "multi_query": True, "parallel_attn": True}),
    "falcon_new": (
        "falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "deepseek_v2": ("deepseek_v2", {**_MLA_MOE, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", {**_MLA_MOE, "first_k_dense_replace": 2}),
    "dots1": ("dots1", {**_MHA, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "qwen2_sliding": (
        "qwen2", {"use_sliding_window": True, "layer_types": _ALTERNATING},
    ),
    "opt_post_norm_width": ("opt", {"word_embed_proj_dim": 16}),
    "llama_one_block": ("llama", {"num_hidden_layers": 1}),
}

_REFUSED: Mapping[str, TinyFamily] = {
    "mamba": TinyFamily("mamba", {}, "recurrent"),
    "falcon_mamba": TinyFamily("falcon_mamba", {}, "recurrent"),
    "qwen3_next": TinyFamily("qwen3_next", {}, "recurrent"),
    "minimax": TinyFamily("minimax", {}, "recurrent"),
}

FAMILIES: Mapping[str, TinyFamily] = {**_servable(), **_REFUSED}
SERVABLE_FAMILIES: tuple[str, ...] = tuple(n for n, f in FAMILIES.items() if f.refusal is None)
REFUSED_FAMILIES: tuple[str, ...] = tuple(n for n, f in FAMILIES.items() if f.refusal is not None)


def make_tiny_checkpoint(
    folder: Path | str,
    family: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint and return its folder.

    Args:
        folder: created if need be.
        family: a name in `FAMILIES`.
        seed: of the weights.
        max_shard_size: small values give several files and an index.
        **overrides: configuration fields, over those of the family.

    Raises:
        ConfigError: unknown family.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomize(model)
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
    return Path(folder)


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model.

    Raises:
        ConfigError: unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; choose one of: {', '.join(FAMILIES)}")
    entry = FAMILIES[family]
    known = dir(AutoConfig.for_model(entry.model_type))
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return AutoConfig.for_model(entry.model_type, **{**sizes, **entry.overrides, **overrides})


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Weights that make every layer matter: matrices of gain about one, uneven norms and biases."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or (name.rpartition(".")[0], "inv_freq") == name:
            continue
        if isinstance(value, torch.nn.Parameter):
            if value.ndim >= 2:
                value.normal_(0.0, 0.2)
            else:
                value.add_(torch.randn_like(value), alpha=0.2)
