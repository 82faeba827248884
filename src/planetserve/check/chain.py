"""A client half and server spans joined in one process: the whole idea without the network.

`LocalChain` runs a checkpoint's client half with `SpanBlocks` in the place of the swarm, each hop
with a cache of its own. The command and the tests compare its logits with the local model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.text_config import text_config
from planetserve.types import BlockSpan


@torch.inference_mode()
def local_logits(model: PreTrainedModel, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of one text given piece by piece `[B, T]`, as a whole local model computes them.

    Some classes continue a text wrongly when they are called without positions, as `generate()`
    never does, so they get positions. Multimodal ones, and Jamba, whose layers begin anew with
    every piece of several tokens, get the whole text each time.
    """
    parameters = inspect.signature(model.forward).parameters
    text = text_config(model.config)
    needs_all = text is not model.config or text.model_type == "jamba"
    logits, cache, length = [], None, 0
    for number, piece_BT in enumerate(pieces, start=1):
        if needs_all:
            output = model(input_ids=torch.cat(list(pieces[:number]), dim=1))
        else:
            positions = {}
            if "position_ids" in parameters:
                positions["position_ids"] = torch.arange(length, length + piece_BT.shape[1])[None]
            output = model(piece_BT, past_key_values=cache, use_cache=True, **positions)
            cache = output.past_key_values
        length += piece_BT.shape[1]
        logits.append(output.logits[:, -piece_BT.shape[1] :])
    return logits


class LengthCache(DynamicCache):
    """A cache that knows how many tokens there are and holds none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0


@dataclass(frozen=True, slots=True)
class LocalHop:
    """One server of the chain and the part of its blocks that the chain uses."""

    blocks: SpanBlocks
    span: BlockSpan


class LocalChain:
    """The model spread over `hops` of one process.

    Args:
        checkpoint: what to load.
        hops: `(span a server loads, part of it the chain runs)`, tiling the model.
        progress: called with what is being loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hops: Sequence[tuple[BlockSpan, BlockSpan]],
        dtype: torch.dtype = torch.float32,
        progress: Callable[[str], None] | None = None,
        quant_type: str = "none",
    ):
        self.hops: list[LocalHop] = []
        for loaded, used in hops:
            if progress is not None:
                progress(f"loading blocks {loaded} of {checkpoint.num_blocks}")
            blocks = SpanBlocks.load(checkpoint, loaded, dtype, quant_type=quant_type)
            self.hops.append(LocalHop(blocks, used))
        self.model = load_client_half(checkpoint, dtype, "cpu", self._remote, self._on_call)
        self.calls: list[dict[str, Any]] = []
        """Arguments of the base model, as `on_call` saw them."""
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self.length = LengthCache()
        self._caches = [hop.blocks.make_cache(hop.span) for hop in self.hops]
        self.calls = []

    @torch.inference_mode()
    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Append tokens to the sequence; returns their logits `[B, T, vocabulary]`."""
        output = self.model(input_ids_BT, past_key_values=self.length, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits

    def _on_call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(kwargs)
        return kwargs

    def _remote(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        start = self.length.num_tokens
        self.length.num_tokens += hidden_BTD.shape[1]
        positions = torch.arange(start, self.length.num_tokens).expand(hidden_BTD.shape[0], -1)
        for hop, cache in zip(self.hops, self._caches, strict=True):
            hidden_BTD = hop.blocks.run(hidden_BTD, positions, cache, span=hop.span)
        return hidden_BTD
