"""Tiny models twice: whole, in plain transformers, and as checkpoints to load spans of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.types import BlockSpan

SPAN = BlockSpan(1, 3)

OVERRIDES: dict[str, dict[str, Any]] = {
    # A cap that bends the logits of tiny models too.
    "gemma2": {"attn_logit_softcapping": 2.0},
    "llama4_text": {
        "attention_chunk_size": 8,
        "layer_types": ["full_attention", "chunked_attention"] * 2,
    },
    "llama_odd_heads": {"hidden_size": 30},
    # Within this length one whole pass and many short ones have the same rotary frequencies.
    "llama_dynamic_rope": {"max_position_embeddings": 128},
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model: the whole of it in plain transformers, and its checkpoint's folder."""

    model: PreTrainedModel
    folder: Path

    def load_span(self, dtype: torch.dtype = torch.float32) -> SpanBlocks:
        return SpanBlocks.load(Checkpoint.open(str(self.folder)), SPAN, dtype)

    @torch.no_grad()
    def states(self, tokens: list[int]) -> list[torch.Tensor]:
        """Hidden states `[T, D]` in front of each block, as transformers computes them."""
        output = self.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        return [state[0] for state in output.hidden_states]

    def reference(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters and what leaves `SPAN`."""
        states = self.states(tokens)
        return states[SPAN.start], states[SPAN.end]
