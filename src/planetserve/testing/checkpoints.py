"""Tiny random checkpoints of many model families, written to a folder as `save_pretrained` would.

A tiny model is a real one: the family's own class and configuration with small sizes, and weights
random and large enough that a wrong layer, a lost position or a shifted mask changes the logits
visibly and that greedy tokens vary. `SERVABLE_FAMILIES` and `REFUSED_FAMILIES` name what is tested;
several names can be variants of one model type. No network is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from planetserve.errors import ConfigError
from planetserve.model.loading import model_class
from planetserve.testing.multimodal import MROPE, has_field, is_multimodal, multimodal_config

VOCAB_SIZE = 96
NUM_BLOCKS = 4
WINDOW = 5
"""Sliding window of the families that have one: shorter than any sequence worth testing."""


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """A model type and what its tiny configuration sets besides the common sizes."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    """Words that the reason for refusing it contains; None for a family that can be served."""


# What a field is called differs between families; a family takes those it knows.
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
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
_MHA = {"num_key_value_heads": 4}
_MLA = {
    **_MHA,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
_MLA_MOE = {**_MLA, "n_group": 2, "topk_group": 1}
_ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)
_GEMMA4 = {
    "layer_types": _ALTERNATING,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
_NO_SHARING = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_ALL_FULL = {"layer_types": ["full_attention"] * NUM_BLOCKS}
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

_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * (NUM_BLOCKS // 2)}
_CONV_AND_FULL = {"layer_types": ["conv", "full_attention"] * (NUM_BLOCKS // 2)}
_DELTA_NET = {
    **_LINEAR_AND_FULL,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA1 = {"mamba_d_state": 8, "mamba_dt_rank": 4}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_MROPE = {**MROPE, "partial_rotary_factor": 1.0}

_PLAIN_NAMES = """
    afmoe apertus arcee aria_text biogpt bitnet bloom cohere cohere2 cohere2_moe ctrl cwm diffllama
    doge ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma2 glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
    jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3
    phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma xglm
"""
"""Model types whose tiny form needs nothing but the common sizes."""

_PLAIN_MULTIMODAL = """
    aria aya_vision cohere2_vision cosmos3_omni deepseek_vl exaone4_5 fuyu gemma3 glm46v glm4v
    glm_ocr glmasr got_ocr2 granite_docling granite_speech hunyuan_vl hyperclovax_vision_v2 idefics2
    idefics3 internvl kosmos-2.5 lighton_ocr llava llava_next llava_next_video llava_onevision
    mistral3 moss_transcribe_diarize muse_glimmer paddleocr_vl qianfan_ocr
    qwen2_5_vl qwen2_audio qwen2_vl qwen3_asr qwen3_vl smolvlm step3p7 video_llama_3
    video_llava vipllava voxtral
"""
"""Multimodal model types, of the same kind."""

_VARIANTS: Mapping[str, TinyFamily] = {
    "axk1": TinyFamily("axk1", {**_MLA_MOE, "first_k_dense_replace": 1}),
    "beam": TinyFamily("beam", _MLA_MOE),
    "codegen": TinyFamily("codegen", {"rotary_dim": 4}),
    "deepseek_v2": TinyFamily("deepseek_v2", {**_MLA_MOE, "first_k_dense_replace": 1}),
    "deepseek_v3": TinyFamily("deepseek_v3", {**_MLA_MOE, "first_k_dense_replace": 2}),
    "dots1": TinyFamily("dots1", {**_MHA, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "falcon_alibi": TinyFamily("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "falcon_mqa": TinyFamily("falcon", {"alibi": False, "multi_query": True}),
    "falcon_new": TinyFamily("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": TinyFamily("gemma", {"num_key_value_heads": 1}),
    "gemma3_text": TinyFamily("gemma3_text", {"layer_types": _ALTERNATING}),
    "gemma4": TinyFamily("gemma4", {"text_config": {**_GEMMA4, **_NO_SHARING}}),
    "gemma4_moe": TinyFamily(
        "gemma4",
        {"text_config": {**_GEMMA4, **_NO_SHARING, "enable_moe_block": True, "top_k_experts": 2}},
    ),
    "gemma4_text": TinyFamily("gemma4_text", {**_GEMMA4, **_NO_SHARING}),
    "gemma4_text_moe": TinyFamily(
        "gemma4_text", {**_GEMMA4, **_NO_SHARING, "enable_moe_block": True, "top_k_experts": 2}
    ),
    "gemma4_unified": TinyFamily("gemma4_unified", {"text_config": _GEMMA4}),
    "gemma4_unified_text": TinyFamily("gemma4_unified_text", _GEMMA4),
    "glm4v_moe": TinyFamily(
        "glm4v_moe",
        {"text_config": {"rope_parameters": _MROPE}},
    ),
    "glm4_moe_lite": TinyFamily(
        "glm4_moe_lite", {**_MLA_MOE, "mlp_layer_types": ["dense"] + ["sparse"] * (NUM_BLOCKS - 1)}
    ),
    "gpt_neo": TinyFamily(
        "gpt_neo",
        {"attention_types": [[["global", "local"], NUM_BLOCKS // 2]], "window_size": WINDOW},
    ),
    "gptj": TinyFamily("gptj", {"rotary_dim": 4}),
    "kimi_k25": TinyFamily("kimi_k25", {"text_config": {**_MLA_MOE, "first_k_dense_replace": 1}}),
    "llama4": TinyFamily(
        "llama4",
        {
            "text_config": {"attention_chunk_size": 6, "intermediate_size_mlp": 48},
            "vision_config": {
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
        },
    ),
    "llama4_text": TinyFamily(
        "llama4_text", {"attention_chunk_size": 6, "intermediate_size_mlp": 48}
    ),
    "llama_bias": TinyFamily("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_dynamic_rope": TinyFamily(
        "llama", {"rope_parameters": _DYNAMIC_ROPE, "max_position_embeddings": 8}
    ),
    "llama_llama3_rope": TinyFamily("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_mha": TinyFamily("llama", _MHA),
    "llama_mqa_tied": TinyFamily("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_odd_heads": TinyFamily(
        "llama",
        {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14},
    ),
    "llama_one_block": TinyFamily("llama", {"num_hidden_layers": 1}),
    "llama_yarn_rope": TinyFamily("llama", {"rope_parameters": _YARN_ROPE}),
    "minicpm3": TinyFamily("minicpm3", _MLA),
    "mistral3_ministral3": TinyFamily("mistral3", {"text_config": {"model_type": "ministral3"}}),
    "opt_narrow_embedding": TinyFamily("opt", {"word_embed_proj_dim": 16}),
    "phi3_longrope": TinyFamily("phi3", {"rope_parameters": _LONG_ROPE}),
    "qwen2_sliding": TinyFamily("qwen2", {"use_sliding_window": True, "layer_types": _ALTERNATING}),
    "qwen3_vl_moe": TinyFamily("qwen3_vl_moe", {"text_config": _ALL_FULL}),
    "youtu": TinyFamily("youtu", _MLA),
}

_HYBRID: Mapping[str, TinyFamily] = {
    "bailing_hybrid": TinyFamily("bailing_hybrid", {**_MLA_MOE, **_LINEAR_AND_FULL}),
    "bamba": TinyFamily("bamba", {**_MAMBA2, "attn_layer_indices": [1, 3]}),
    "falcon_h1": TinyFamily("falcon_h1", {**_MAMBA2, "mamba_d_ssm": 64}),
    "granitemoehybrid": TinyFamily("granitemoehybrid", {**_MAMBA2, **_LINEAR_AND_FULL}),
    "jamba": TinyFamily("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, **_MAMBA1}),
    "kimi_linear": TinyFamily(
        "kimi_linear",
        {**_MLA_MOE, **_LINEAR_AND_FULL, "linear_num_heads": 4, "linear_head_dim": 8},
    ),
    "lfm2": TinyFamily("lfm2", _CONV_AND_FULL),
    "lfm2_moe": TinyFamily("lfm2_moe", {**_CONV_AND_FULL, "num_dense_layers": 1}),
    "lfm3": TinyFamily("lfm3"),
    "nemotron_h": TinyFamily(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "olmo_hybrid": TinyFamily("olmo_hybrid", _DELTA_NET),
    "qwen3_5": TinyFamily("qwen3_5", {"text_config": {**_DELTA_NET, "rope_parameters": _MROPE}}),
    "qwen3_5_moe": TinyFamily(
        "qwen3_5_moe", {"text_config": {**_DELTA_NET, "rope_parameters": _MROPE}}
    ),
    "qwen3_5_moe_text": TinyFamily("qwen3_5_moe_text", {**_DELTA_NET, "rope_parameters": _MROPE}),
    "qwen3_5_text": TinyFamily("qwen3_5_text", {**_DELTA_NET, "rope_parameters": _MROPE}),
    "qwen3_next": TinyFamily("qwen3_next", _DELTA_NET),
}
"""Families whose layers keep states."""

_REFUSED: Mapping[str, TinyFamily] = {
    "bart": TinyFamily("bart", refusal="encoder-decoder"),
    "bert": TinyFamily("bert", refusal="it is an encoder"),
    "deepseek_v32": TinyFamily("deepseek_v32", refusal="more than keys and values"),
    "falcon_mamba": TinyFamily("falcon_mamba", refusal="no attention"),
    "diffusion_gemma": TinyFamily("diffusion_gemma", refusal="by diffusion"),
    "gemma3n_text": TinyFamily("gemma3n_text", refusal="share keys and values"),
    "gemma4_e": TinyFamily("gemma4", refusal="token embeddings of their own"),
    "gemma4_text_e": TinyFamily("gemma4_text", refusal="token embeddings of their own"),
    "inkling2_text": TinyFamily("inkling2_text", refusal="other results"),
    "inkling_text": TinyFamily("inkling_text", refusal="other results"),
    "kosmos-2": TinyFamily("kosmos-2", refusal="without an image"),
    "mamba": TinyFamily("mamba", refusal="no attention"),
    "mamba2": TinyFamily("mamba2", refusal="no attention"),
    "minimax": TinyFamily("minimax", refusal="recurrent"),
    "mllama": TinyFamily("mllama", refusal="attend to images"),
    "openai-gpt": TinyFamily("openai-gpt", refusal="without a cache"),
    "paligemma": TinyFamily("paligemma", refusal="in both directions"),
    "recurrent_gemma": TinyFamily("recurrent_gemma", refusal="recurrent"),
    "rwkv": TinyFamily("rwkv", refusal="recurrent"),
    "xlstm": TinyFamily("xlstm", refusal="recurrent"),
    "zamba": TinyFamily("zamba", refusal="token embeddings"),
    "zamba2": TinyFamily("zamba2", refusal="token embeddings"),
    "zaya": TinyFamily("zaya", refusal="other results"),
}

FAMILIES: Mapping[str, TinyFamily] = {
    **{name: TinyFamily(name) for name in (_PLAIN_NAMES + _PLAIN_MULTIMODAL).split()},
    **_VARIANTS,
    **_HYBRID,
    **_REFUSED,
}
HYBRID_FAMILIES = tuple(sorted(_HYBRID))
SERVABLE_FAMILIES = tuple(sorted(n for n, f in FAMILIES.items() if f.refusal is None))
REFUSED_FAMILIES = tuple(sorted(n for n, f in FAMILIES.items() if f.refusal is not None))


def make_tiny_checkpoint(
    folder: Path | str,
    family: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint and return its folder.

    Of a refused family only the configuration is written, in its own default sizes; no more of it
    is ever read.

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
    if FAMILIES[family].refusal is not None:
        config.save_pretrained(folder)
        return Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).from_config(config)
        _randomize(model)
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
    return Path(folder)


def load_local(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model of a folder, as transformers loads it."""
    model: PreTrainedModel = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=dtype
    )
    return model.eval()


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model; a refused family gets its own default sizes.

    Raises:
        ConfigError: unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; choose one of: {', '.join(FAMILIES)}")
    entry = FAMILIES[family]
    values = {**entry.overrides, **overrides}
    if entry.refusal is None and is_multimodal(entry.model_type):
        return multimodal_config(entry.model_type, _SIZES, values)
    if entry.refusal is None:
        default = AutoConfig.for_model(entry.model_type)
        values = {name: v for name, v in _SIZES.items() if has_field(default, name)} | values
    return AutoConfig.for_model(entry.model_type, **values)


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Weights that make every layer matter: matrices of gain above one, uneven norms and biases.

    Embeddings are small, so that the layers outweigh them and a tied head does not just repeat the
    last token.
    """
    for module in model.modules():
        std = 0.05 if isinstance(module, torch.nn.Embedding) else 0.35
        for value in module.parameters(recurse=False):
            if value.ndim >= 2:
                value.normal_(0.0, std)
            else:
                value.add_(torch.randn_like(value), alpha=0.2)
