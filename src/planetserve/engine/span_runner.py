"""A span of a model that runs scheduled batches: ragged where the model allows it, else padded.

`probe` chooses the way when the runner is made; a model that allows neither runs one sequence per
pass. All ways take the same batches and give the same results; only speed and limits differ. Used
by the engine thread only; every call happens under `torch.inference_mode`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from planetserve.engine import attention
from planetserve.engine.padded import SharingLimits
from planetserve.engine.padded_runner import PaddedRunner
from planetserve.engine.passes import Runner, split_by_length
from planetserve.engine.plain_runner import PlainRunner
from planetserve.engine.probe import Batching, Verdict, continues_by_token, examine, why_not_padded
from planetserve.engine.ragged_runner import RaggedRunner
from planetserve.engine.sdpa import SdpaBackend
from planetserve.errors import ConfigError
from planetserve.model.span_blocks import KvShape, SpanBlocks
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.scheduler.kv_row import StateBudget
from planetserve.types import BlockSpan

logger = logging.getLogger(__name__)


class SpanRunner:
    """Blocks over a KV cache of `num_pages` pages.

    Args:
        blocks: the loaded span.
        num_pages: pages of the KV cache.
        page_size: tokens per page, rounded up (to fewer pages) to what the attention backend needs.
        attention_backend: name in `attention.BACKENDS`.
        best: the best way to try; better ones are left out.
        state_snapshots: earlier states of recurrent layers that a row keeps.

    Raises:
        ConfigError: unknown backend, or too few pages for the states of one row.
        ModelError: the span cannot be run in steps.
    """

    def __init__(
        self,
        blocks: SpanBlocks,
        num_pages: int,
        page_size: int,
        attention_backend: str = "auto",
        best: Batching = Batching.RAGGED,
        state_snapshots: int = 2,
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
        state_bytes = blocks.state_bytes()
        self.chunkable = blocks.constant_rotary_length is None
        """Whether the new tokens of a row may be spread over several passes."""
        backend, self.verdict = self._try_out(blocks, backend, best, has_states=state_bytes > 0)
        self.batching = self.verdict.batching
        multiple = backend.page_multiple if self.batching is Batching.RAGGED else 1
        self.page_size = -(-page_size // multiple) * multiple
        self.num_pages = max(1, cache_tokens // self.page_size)
        self.states = self._state_budget(state_bytes, state_snapshots)
        """What a row takes for states of recurrent layers."""
        self.is_fused = self.verdict.fused is not None
        """Whether the layers run as kernels instead of by their own code."""
        self._limits: SharingLimits | None = None
        """When sessions share a padded pass."""
        self._runner = self._make_runner(blocks, backend, shapes)

    def _state_budget(self, state_bytes: int, num_kept: int) -> StateBudget:
        """Pages that stand for the states of a row.

        A page counts with its keys and values and with the inputs of its tokens, which are kept to
        compute states again.
        """
        if not state_bytes:
            return StateBudget()
        token_bytes = self.bytes_per_token + self.hidden_size * self.dtype.itemsize
        pages = -(-state_bytes * (1 + num_kept) // (token_bytes * self.page_size))
        tokens = pages * self.page_size
        logger.info(
            "states of one row take %.1f MiB, %d of them kept: as much as %d tokens of KV cache",
            state_bytes / 2**20, 1 + num_kept, tokens,
        )  # fmt: skip
        if pages >= self.num_pages:
            raise ConfigError(
                f"a KV cache of {self.num_pages * self.page_size} tokens holds no session: the "
                f"states of one take as much as {tokens} tokens; give --attn_cache_tokens "
                f"{4 * tokens} or more, or fewer blocks"
            )
        return StateBudget(pages, num_kept)

    def _make_runner(
        self, blocks: SpanBlocks, backend: attention.AttentionBackend, shapes: Sequence[KvShape]
    ) -> Runner:
        name, why_not = f"{blocks.model_name} {blocks.span}", self.verdict.why_not_ragged
        if self.batching is Batching.PLAIN:
            logger.info(
                "%s runs one sequence per pass: %s; %s", name, why_not, self.verdict.why_not_padded
            )
            return PlainRunner(blocks)
        pages = (self.num_pages, self.page_size)
        runner: Runner
        if self.batching is Batching.PADDED:
            logger.info("%s runs sessions as padded rows: %s", name, why_not)
            num_heads = getattr(blocks.config, "num_attention_heads", 0)
            limits = SharingLimits.of(blocks.layers, shapes, num_heads, self.dtype.itemsize)
            self._limits = limits if shapes else None
            by_token = self.verdict.by_token
            runner = PaddedRunner(blocks, *pages, limits, by_token=by_token)
        else:
            blocks.set_attention(attention.NAME)
            key_bytes = self.dtype.itemsize * max(s.num_heads * s.key_dim for s in shapes)
            limit = backend.max_grouped_context(self.device, key_bytes)
            runner = RaggedRunner(blocks, *pages, backend, limit, self.verdict.fused)
        return split_by_length(runner, blocks.constant_rotary_length)

    @torch.inference_mode()
    def _try_out(
        self,
        blocks: SpanBlocks,
        backend: attention.AttentionBackend,
        best: Batching,
        *,
        has_states: bool,
    ) -> tuple[attention.AttentionBackend, Verdict]:
        """The ways in which the span can run, and the attention backend for the ragged way."""
        if has_states:
            by_token = continues_by_token(blocks, self.hidden_size, self.dtype, self.device)
            return backend, Verdict("its layers keep states", by_token=by_token)
        off = "it is switched off"
        if best is Batching.PLAIN:
            return backend, Verdict(off, off)
        verdict = Verdict(off)
        if best is Batching.RAGGED:
            backend, verdict = self._try_ragged(blocks, backend)
        if verdict.why_not_ragged is not None:
            reason = why_not_padded(blocks, self.hidden_size, self.dtype, self.device)
            verdict = verdict._replace(why_not_padded=reason)
        return backend, verdict

    def _try_ragged(
        self, blocks: SpanBlocks, backend: attention.AttentionBackend
    ) -> tuple[attention.AttentionBackend, Verdict]:
        """Whether the span can run raggedly, and with which backend: this one, or else the
        reference."""
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
        """Whether a sequence's pages may be taken and filled again."""
        return self.is_paged and self.chunkable

    @property
    def state_bytes_held(self) -> int:
        """Bytes of the states of all sequences."""
        return self._runner.states.num_bytes if isinstance(self._runner, PaddedRunner) else 0

    @property
    def is_paged(self) -> bool:
        """Whether keys and values lie in pages, so that sessions can share passes."""
        return self.batching is not Batching.PLAIN

    def sessions_per_pass(self, context: int) -> int | None:
        """Sessions of `context` tokens whose next tokens go through the layers in one pass; None if
        only the tokens of a batch limit their number."""
        if self.batching is Batching.PLAIN:
            return 1
        return self._limits.num_rows(context) if self._limits is not None else None

    def prepare(self, batch: ScheduledBatch) -> None:
        """Carry out what the batch says about sequences and pages; once, before `forward`."""
        self._runner.prepare(batch)

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan | None = None,
    ) -> torch.Tensor:
        """Compute chunks of a batch that has been prepared. May be repeated for the same chunks.

        Args:
            chunks: at least one.
            hidden_TD: the chunks' hidden states, one after the other, in the span's dtype and on
                its device.
            positions_T: their rotary positions.
            span: the blocks they pass, by default all; always the same for one sequence.

        Returns:
            Hidden states after these blocks, in the same order.
        """
        return self._runner.forward(chunks, hidden_TD, positions_T, span or self.span)
