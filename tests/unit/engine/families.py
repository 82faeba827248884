"""Tiny random models of several families, as checkpoints on disk and as plain transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from planetserve.model.checkpoint import Checkpoint
from planetserve.model.skeleton import SpanBlocks
from planetserve.types import BlockSpan

VOCAB_SIZE = 61
SPAN = BlockSpan(1, 3)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

RAGGED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "multi_head": ("llama", {"num_key_value_heads": 4}),
    "multi_query": ("llama", {"num_key_value_heads": 1}),
    "odd_head_dim": ("qwen3", {"head_dim": 6}),
    "sliding_window": ("mistral", {"sliding_window": 8}),
    "alternating_windows": ("gemma3_text", {"head_dim": 8, "sliding_window": 6}),
    "softcap": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "sinks": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "shared_expert_intermediate_size": 16, **_MOE},
    ),
    "latent_attention": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
            **_MOE,
        },
    ),
    "chunked": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
            "moe_layers": [],
            "layer_types": ["full_attention", "chunked_attention"] * 2,
        },
    ),
    "learned_positions": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128}),
}
"""Families whose layers share a pass; the name says what is special about each."""

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi": ("bloom", {"n_head": 4, "n_layer": 4}),
    "no_arguments": ("stablelm", {}),
    "own_attention": ("falcon", {}),
    "dynamic_rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
}
"""Families that run one sequence per pass."""


def make_model(family: str) -> PreTrainedModel:
    """A float32 model with weights large enough that a wrong attention is not lost in noise."""
    model_type, options = (RAGGED | PLAIN)[family]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**_SIZES, **options}), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                parameter.normal_(std=1.0 if "sinks" in name else 0.15)
    return model


def load_span(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> SpanBlocks:
    """Blocks `SPAN` of `model`, by way of a checkpoint in `folder`."""
    model.save_pretrained(folder)
    return SpanBlocks.load(Checkpoint.open(str(folder)), SPAN, dtype)


@torch.no_grad()
def reference(model: PreTrainedModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and what leaves `SPAN` when plain transformers runs `tokens`, `[T, D]` each."""
    states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return states[SPAN.start][0], states[SPAN.end][0]
