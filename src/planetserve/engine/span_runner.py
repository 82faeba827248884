"""A span of a model that runs scheduled batches: ragged where the model allows it, else plain.

The mode is found by `probe` when the runner is made. Both modes take the same batches and give the
same results; only speed and limits differ. Used by one thread, the engine's; every call happens
under `torch.inference_mode`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from planetserve.engine import attention
from planetserve.engine.plain_runner import PlainRunner
from planetserve.engine.probe import Verdict, examine
from planetserve.engine.ragged_runner import RaggedRunner
from planetserve.engine.sdpa import SdpaBackend
from planetserve.model.skeleton import SpanBlocks
from planetserve.scheduler.batch import Piece, ScheduledBatch
from planetserve.types import BlockSpan

logger = logging.getLogger(__name__)


class SpanRunner:
    """Blocks over a KV cache of `num_pages` pages.

    Args:
        blocks: the loaded span.
        num_pages: pages of the KV cache.
        page_size: tokens per page, rounded up (to fewer pages) to what the attention backend needs.
        attention_backend: name in `attention.BACKENDS`.
        allow_ragged: False runs one sequence per pass without trying anything else.

    Raises:
        ConfigError: unknown backend.
        ModelError: the span cannot be run in steps.
    """

    def __init__(
        self,
        blocks: SpanBlocks,
        num_pages: int,
        page_size: int,
        attention_backend: str = "auto",
        allow_ragged: bool = True,
    ):
        attention.BACKENDS.check(attention_backend)
        self.device: torch.device = next(blocks.layers[0].parameters()).device
        self.dtype: torch.dtype = blocks.base.config.dtype
        self.span = blocks.span
        self.hidden_size: int = blocks.base.config.hidden_size
        shapes = blocks.kv_shapes()
        cache_tokens = num_pages * page_size
        backend = attention.BACKENDS.create_from(
            attention_backend,
            device=self.device,
            dtype=self.dtype,
            kv_shapes=shapes,
            cache_tokens=cache_tokens,
        )
        self.bytes_per_token = self.dtype.itemsize * sum(
            shape.num_heads * (shape.key_dim + shape.value_dim) for shape in shapes
        )
        """KV cache bytes of one token in all blocks."""
        self.chunkable = not blocks.rotary_depends_on_length
        """Whether the new tokens of a row may be spread over several passes."""
        verdict = Verdict("it is switched off")
        if allow_ragged:
            backend, verdict = self._try_out(blocks, backend)
        self.is_ragged = verdict.why_not_ragged is None
        multiple = backend.page_multiple if self.is_ragged else 1
        self.page_size = -(-page_size // multiple) * multiple
        self.num_pages = max(1, cache_tokens // self.page_size)
        self.is_fused = verdict.fused is not None
        """Whether the layers run as kernels instead of by their own code."""
        self._runner: RaggedRunner | PlainRunner
        if self.is_ragged:
            blocks.set_attention(attention.NAME)
            key_bytes = self.dtype.itemsize * max(s.num_heads * s.key_dim for s in shapes)
            limit = backend.max_grouped_context(self.device, key_bytes)
            self._runner = RaggedRunner(
                blocks, self.num_pages, self.page_size, backend, limit, verdict.fused
            )
        else:
            logger.info(
                "%s %s runs one sequence per pass: %s",
                blocks.model_name, blocks.span, verdict.why_not_ragged,
            )  # fmt: skip
            self._runner = PlainRunner(blocks)

    @torch.inference_mode()
    def _try_out(
        self, blocks: SpanBlocks, backend: attention.AttentionBackend
    ) -> tuple[attention.AttentionBackend, Verdict]:
        """Whether the span can be batched, and with what: this backend, or else the reference."""
        verdict = examine(blocks, self.hidden_size, self.dtype, self.device, backend)
        if verdict.why_not_ragged is None or isinstance(backend, SdpaBackend):
            return backend, verdict
        reference = SdpaBackend()
        second = examine(blocks, self.hidden_size, self.dtype, self.device, reference)
        if second.why_not_ragged is not None:
            return backend, verdict
        logger.info(
            "attention backend sdpa: with %s, %s", type(backend).__name__, verdict.why_not_ragged
        )
        return reference, second

    @property
    def can_preempt(self) -> bool:
        """Whether a sequence's pages may be taken and filled again: plain caches are not paged."""
        return self.is_ragged and self.chunkable

    def prepare(self, batch: ScheduledBatch) -> None:
        """Carry out what the batch says about sequences and pages; once, before `forward`."""
        self._runner.prepare(batch)

    def forward(
        self,
        pieces: Sequence[Piece],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan | None = None,
    ) -> torch.Tensor:
        """Compute pieces of a batch that has been prepared. May be repeated for the same pieces.

        Args:
            pieces: at least one.
            hidden_TD: the pieces' hidden states, one after the other, in the span's dtype and on
                its device.
            positions_T: their rotary positions.
            span: the blocks they pass, by default all; always the same for one sequence.

        Returns:
            Hidden states after these blocks, in the same order.
        """
        return self._runner.forward(pieces, hidden_TD, positions_T, span or self.span)
