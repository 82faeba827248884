"""Decides at load time how the sessions of a span share passes, by a trial and not by a list.

A few steps of two sessions (prompts of different lengths, single tokens, rollbacks, a chunk) go
through the ragged runner and, sequence by sequence, through the plain one, which uses the model's
own attention. Only if every layer called the paged attention exactly once per pass and all outputs
agree is the span served raggedly. What a short run cannot show (a window longer than the probe, an
unknown argument) is refused in `attention` while the probe runs. The padded runner, which leaves
the attention to the model, goes through the same steps.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch

from planetserve.engine import attention
from planetserve.engine.fused import FusedLayers
from planetserve.engine.padded import SharingLimits, shared_passes
from planetserve.engine.padded_runner import PaddedRunner
from planetserve.engine.passes import Runner, split_by_length, token_rows
from planetserve.engine.plain_runner import PlainRunner
from planetserve.engine.ragged_runner import RaggedRunner
from planetserve.errors import ModelError
from planetserve.model.span_blocks import SpanBlocks
from planetserve.scheduler.batch import ScheduledBatch, StepRequest
from planetserve.scheduler.kv_row import StateBudget
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.wire.step import RowSlice

logger = logging.getLogger(__name__)

_PAGE_SIZE = 4
_NUM_TOKENS = 64
_MAX_GROUPED_CONTEXT = 8
"""Longest context that is grouped in the trial; in the middle of the script's lengths, so that both
grouped and single calls are tried."""
_NUM_BEFORE_CHANGE = 8
"""Number of tokens before the length at which rotary frequencies change, where a second run of the
script starts."""
_SHARES_ALL = SharingLimits(pass_tokens=1 << 30, max_copied=1 << 30)
_SEED = 20240731

_FLOAT32_TOLERANCE = 1e-4
_STATE_TOLERANCE = 1e-2
"""Some families bound time steps where they compute many tokens and not where they compute one."""
_HALF_TOLERANCE = 5e-2
_HALF_QUORUM = 0.75
"""Fraction of all tokens that must agree in half precision, where a near tie between experts may be
decided differently."""

# Per tick: (session, first position, tokens).
_SCRIPT = (
    ((0, 0, 11), (1, 0, 5)),
    ((0, 11, 1), (1, 5, 1)),
    ((0, 9, 2), (1, 6, 1)),
    ((0, 11, 1), (1, 7, 6)),
    ((1, 13, 1), (0, 12, 1)),
    ((0, 13, 2), (1, 8, 2)),
    ((0, 15, 1), (1, 10, 1)),
    ((0, 13, 3), (1, 8, 3)),
)


_SMALL_QUORUM = 0.6
"""The same of less than ten tokens."""
_NO_STATES = StateBudget()


class Batching(enum.StrEnum):
    """How sessions share passes, best first."""

    RAGGED = "ragged"
    """All tokens of a batch as one sequence; only our attention separates the sessions."""
    PADDED = "padded"
    """Steps of equal length as rows of a batch, padded to the longest context."""
    PLAIN = "plain"
    """Sessions share no passes."""


class Verdict(NamedTuple):
    """What a span allows.

    Attributes:
        why_not_ragged: why it cannot be batched raggedly, or None if it can.
        why_not_padded: if not raggedly, why it cannot be padded either, or None if it can.
        fused: its layers as kernels, if it can be batched raggedly and they give the same.
        by_token: whether its recurrent layers go on from a state with one token at a time.
    """

    why_not_ragged: str | None
    why_not_padded: str | None = None
    fused: FusedLayers | None = None
    by_token: bool = False

    @property
    def batching(self) -> Batching:
        """The best way to run it."""
        if self.why_not_ragged is None:
            return Batching.RAGGED
        return Batching.PADDED if self.why_not_padded is None else Batching.PLAIN


class _Pages(NamedTuple):
    """The pages that the script needs."""

    num: int
    size: int

    @classmethod
    def of(cls, backend: attention.AttentionBackend) -> _Pages:
        size = max(_PAGE_SIZE, backend.page_multiple)
        return cls(max(4, _NUM_TOKENS // size), size)


class _Step(NamedTuple):
    batch: ScheduledBatch
    hidden_TD: torch.Tensor
    positions_T: torch.Tensor


def examine(
    blocks: SpanBlocks,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: attention.AttentionBackend,
) -> Verdict:
    """Try out whether the span can be run raggedly. Leaves its attention as it was.

    Raises:
        ModelError: passes over a cache do not give what one pass over everything gives, so the
            span cannot be served in steps at all.
    """
    steps = _steps(blocks, _inputs(hidden_size, dtype, device), _Pages.of(backend))
    own_attention: str = blocks.base.config._attn_implementation  # noqa: SLF001 - has no public name
    expected = _run_plain(blocks, steps)
    blocks.set_attention(attention.NAME)
    try:
        return _try_ragged(blocks, steps, expected, backend)
    finally:
        blocks.set_attention(own_attention)


def why_not_padded(
    blocks: SpanBlocks, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Try out whether the span can be run as padded rows; None if it can.

    Raises:
        ModelError: as in `examine`.
    """
    pages = _Pages(_NUM_TOKENS // _PAGE_SIZE, _PAGE_SIZE)
    steps = _steps(blocks, _inputs(hidden_size, dtype, device), pages)
    expected = _run_plain(blocks, steps)
    padded = split_by_length(
        PaddedRunner(blocks, *pages, _SHARES_ALL), blocks.constant_rotary_length
    )
    actual = []
    for step in steps:
        padded.prepare(step.batch)
        try:
            actual.append(_run(padded, step, blocks))
        except Exception as error:  # noqa: BLE001 - a family's code may raise anything here
            logger.debug("the probe's padded pass failed", exc_info=True)
            return f"its code fails on padded rows ({type(error).__name__})"
    tensors = [torch.cat(part) for part in (actual, expected, [s.hidden_TD for s in steps])]
    # Checked separately: the others are so many that they could hide a difference.
    padded_rows = [tensor[_padded_rows(steps)] for tensor in tensors]
    if not agree(*tensors) or not agree(*padded_rows):
        return "padded and single passes differ"
    return None


def continues_by_token(
    blocks: SpanBlocks, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Try out how a span with recurrent layers goes on from a state: False if with any number of
    tokens, True if with one at a time alone (Mamba-1 in transformers).

    The reference is one pass over all tokens so far, without a cache.

    Raises:
        ModelError: neither gives the same, so the span cannot be served.
    """
    pages = _Pages(_NUM_TOKENS // _PAGE_SIZE, _PAGE_SIZE)
    inputs = _inputs(hidden_size, dtype, device)
    steps = list(_script(inputs, pages, StateBudget(1, 1)))
    expected = []
    for step in steps:
        for chunk in step.batch.chunks:
            hidden = inputs[chunk.item_id][: chunk.end]
            positions = torch.arange(chunk.end, device=device)
            expected.append(blocks.run(hidden[None], positions[None])[0, chunk.start :])
            _check_finite(expected[-1], blocks)
    chunks = [chunk for step in steps for chunk in step.batch.chunks]
    several = [i for i, chunk in enumerate(chunks) if chunk.start and chunk.num_tokens > 1]
    going_on = list(token_rows(chunks, several))
    for by_token in (False, True):
        padded = PaddedRunner(blocks, *pages, _SHARES_ALL, by_token=by_token)
        actual = []
        for step in steps:
            padded.prepare(step.batch)
            actual.append(_run(padded, step, blocks))
        made, known, hidden = (
            torch.cat(p) for p in (actual, expected, [s.hidden_TD for s in steps])
        )
        # Few apart from the others, which could outvote them.
        if all(
            agree(made[rows], known[rows], hidden[rows], _STATE_TOLERANCE, quorum)
            for rows, quorum in (
                (slice(None), _HALF_QUORUM),
                (_padded_rows(steps), _SMALL_QUORUM),
                (going_on, _SMALL_QUORUM),
            )
        ):
            return by_token
    half = "" if dtype == torch.float32 else f" in {_name(dtype)}{_WIDER}"
    raise ModelError(
        f"{blocks.model_name}: steps from states do not reproduce one whole pass, "
        f"so it cannot be served{half}"
    )


def _padded_rows(steps: list[_Step]) -> list[int]:
    """Indices of the tokens of padded rows in the concatenation of all steps."""
    rows: list[int] = []
    offset = 0
    for step in steps:
        chunks = step.batch.chunks
        for members in shared_passes(chunks, _SHARES_ALL):
            longest = max(chunks[index].end for index in members)
            shorter = [index for index in members if chunks[index].end < longest]
            rows.extend(offset + row for row in token_rows(chunks, shorter))
        offset += step.batch.num_tokens
    return rows


def agree(
    actual_TD: torch.Tensor,
    expected_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    tolerance: float = _FLOAT32_TOLERANCE,
    quorum: float = _HALF_QUORUM,
) -> bool:
    """Whether two results of a span are the same up to the noise of their dtype.

    Measured per token against what the span added to `hidden_TD`, its input; `tolerance` is the
    one of float32, `quorum` the part of all tokens that must agree in half precision.
    """
    half = expected_TD.dtype != torch.float32
    tolerance = _HALF_TOLERANCE if half else tolerance
    rounding = 4 * torch.finfo(expected_TD.dtype).eps
    actual, expected, hidden = (x.float() for x in (actual_TD, expected_TD, hidden_TD))
    error_T = (actual - expected).norm(dim=-1)
    allowed_T = tolerance * (expected - hidden).norm(dim=-1) + rounding * expected.norm(dim=-1)
    share = (error_T <= allowed_T).float().mean().item()
    return share >= (quorum if half else 1.0)


def _try_ragged(
    blocks: SpanBlocks,
    steps: list[_Step],
    expected: list[torch.Tensor],
    backend: attention.AttentionBackend,
) -> Verdict:
    ragged = RaggedRunner(blocks, *_Pages.of(backend), backend, _MAX_GROUPED_CONTEXT)
    runner = split_by_length(ragged, blocks.constant_rotary_length)
    actual: list[torch.Tensor] = []
    options: list[attention.AttentionOptions] = []
    for step in steps:
        try:
            runner.prepare(step.batch)
            actual.append(_run(runner, step, blocks))
        except attention.UnsupportedAttention as error:
            return Verdict(str(error))
        except Exception as error:  # noqa: BLE001 - a family's code may raise anything here
            logger.debug("the probe's ragged pass failed", exc_info=True)
            return Verdict(
                f"its code fails on a batch of several sequences ({type(error).__name__})"
            )
        seen = [] if ragged.last_pass is None else ragged.last_pass.layers_seen
        if seen != list(range(len(blocks.span))):
            return Verdict(
                f"{len(seen)} calls of the paged attention from {len(blocks.span)} layers"
            )
        options = [] if ragged.last_pass is None else ragged.last_pass.options_seen
    hidden = torch.cat([step.hidden_TD for step in steps])
    if not agree(torch.cat(actual), torch.cat(expected), hidden):
        return Verdict("batched and single passes differ")
    if not any(map(backend.serves, options)):
        return Verdict("no layer has attention that this backend computes itself")
    fused = FusedLayers.of(blocks, options, backend)
    if fused is not None and not _is_right(fused, blocks, steps, backend):
        fused = None
    return Verdict(None, fused=fused)


def _is_right(
    fused: FusedLayers,
    blocks: SpanBlocks,
    steps: list[_Step],
    backend: attention.AttentionBackend,
) -> bool:
    """Whether fused layers give what the model's own code gives in the same batches.

    The last positions are compared too, because families may treat them differently.
    """
    furthest = getattr(blocks.config, "max_position_embeddings", None) or 0
    for offset in (0, max(0, furthest - _NUM_TOKENS)):
        moved = [step._replace(positions_T=step.positions_T + offset) for step in steps]
        outputs: list[torch.Tensor] = []
        for layers in (fused, None):
            runner = RaggedRunner(
                blocks, *_Pages.of(backend), backend, _MAX_GROUPED_CONTEXT, layers
            )
            results = []
            for step in moved:
                runner.prepare(step.batch)
                try:
                    results.append(_run(runner, step, blocks))
                except Exception:  # noqa: BLE001 - parts that only look like the common shape
                    logger.debug("the probe's fused pass failed", exc_info=True)
                    return False
            outputs.append(torch.cat(results))
        if not agree(outputs[0], outputs[1], torch.cat([step.hidden_TD for step in steps])):
            return False
    return True


def _run_plain(blocks: SpanBlocks, steps: list[_Step]) -> list[torch.Tensor]:
    """The steps' outputs one sequence at a time, checked against one whole pass per session."""
    plain = PlainRunner(blocks)
    outputs = []
    tokens: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    for step in steps:
        plain.prepare(step.batch)
        outputs.append(_run(plain, step, blocks))
        _check_finite(outputs[-1], blocks)
        new = iter(zip(step.hidden_TD, step.positions_T, outputs[-1], strict=True))
        for chunk in step.batch.chunks:
            del tokens[chunk.item_id][chunk.start :]
            tokens[chunk.item_id] += itertools.islice(new, chunk.num_tokens)
    for session in tokens:
        if len(session) > (blocks.constant_rotary_length or len(session)):
            continue  # here one whole pass embeds positions by its own length
        hidden, positions, output = (torch.stack(part) for part in zip(*session, strict=True))
        whole = blocks.run(hidden[None], positions[None])[0]
        _check_finite(whole, blocks)
        if not agree(output, whole, hidden):
            half = "" if whole.dtype == torch.float32 else f" in {_name(whole.dtype)}{_WIDER}"
            raise ModelError(
                f"{blocks.model_name}: steps over a cache do not reproduce one whole pass, "
                f"so it cannot be served{half}"
            )
    return outputs


_WIDER = "; serve it with --torch_dtype float32"


def _check_finite(output_TD: torch.Tensor, blocks: SpanBlocks) -> None:
    """Refuse a span that gives infinities or NaN, and say where they come from.

    Raises:
        ModelError: as said.
    """
    if bool(output_TD.isfinite().all()):
        return
    damaged = (
        name
        for name, value in blocks.layers.named_parameters()
        if value.is_floating_point() and not bool(value.isfinite().all())
    )
    name, dtype = next(damaged, None), output_TD.dtype
    first = f"{blocks.model_name}: blocks {blocks.span} of it"
    if name is not None:
        block, _, rest = name.partition(".")
        first = f"{blocks.model_name}: {rest} of block {blocks.span.start + int(block)}"
    if dtype == torch.float16:
        raise ModelError(
            f"{first} {'reach' if name is None else 'reaches'} past the range of float16 "
            "(overflow: inf or NaN); serve it with --torch_dtype bfloat16 or float32"
        )
    if name is not None:
        raise ModelError(f"{first} holds NaN or inf; download or copy the checkpoint again")
    advice = _WIDER if dtype != torch.float32 else "; compare the checkpoint with its source"
    raise ModelError(f"{first} give NaN or inf in {_name(dtype)}{advice}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(runner: Runner, step: _Step, blocks: SpanBlocks) -> torch.Tensor:
    return runner.forward(step.batch.chunks, step.hidden_TD, step.positions_T, blocks.span)


def _inputs(hidden_size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Random hidden states per session, scaled so that rounding is small beside what layers add."""
    generator = torch.Generator().manual_seed(_SEED)
    scale = 1.0 if dtype == torch.float32 else 0.1
    return [
        (scale * torch.randn(16, hidden_size, generator=generator)).to(device, dtype)
        for _ in range(2)
    ]


def _steps(blocks: SpanBlocks, inputs: list[torch.Tensor], pages: _Pages) -> list[_Step]:
    """The script; first where rotary frequencies begin to change, if they do, then from 0 on."""
    steps = []
    if blocks.constant_rotary_length is not None:
        offset = max(0, blocks.constant_rotary_length - _NUM_BEFORE_CHANGE)
        for step in _script(inputs, pages):
            steps.append(step._replace(positions_T=step.positions_T + offset))
    return [*steps, *_script(inputs, pages)]


def _script(
    inputs: list[torch.Tensor], pages: _Pages, states: StateBudget = _NO_STATES
) -> Iterator[_Step]:
    scheduler = Scheduler(SchedulerConfig(*pages, states=states))
    sessions = [bytes([0]), bytes([1])]
    for session_id in sessions:
        scheduler.open(session_id, num_rows=1)
    for tick in _SCRIPT:
        for session, start, count in tick:
            scheduler.add(StepRequest(session, sessions[session], (RowSlice(0, start, count),)))
        batch = scheduler.schedule()
        scheduler.commit(batch)
        hidden = [inputs[chunk.item_id][chunk.start : chunk.end] for chunk in batch.chunks]
        positions = [torch.arange(chunk.start, chunk.end) for chunk in batch.chunks]
        yield _Step(batch, torch.cat(hidden), torch.cat(positions).to(inputs[0].device))
