"""A model of a few integers per token, exact in float32: over the pages of an engine, and plain.

Every block mixes a token with all tokens before it by their place, so a token that is in a wrong
page, repeated, lost or not removed by a rollback changes every output after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import torch
from typing_extensions import override

from planetserve.clock import Clock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.probe import Batching
from planetserve.engine.span_runner import SpanRunner
from planetserve.engine.worker import Worker
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.scheduler.kv_row import StateBudget
from planetserve.scheduler.speed import StepCost, StepLatency
from planetserve.testing.virtual_time import VirtualTimeLoop
from planetserve.types import BlockSpan

WIDTH = 4
VOCABULARY = 97
_PRIME = 8191
_MIX_INTS = (1, 3, 5, 7)
_MIX = np.array(_MIX_INTS)
_LANES = np.arange(1, WIDTH + 1)
_PLACES = np.arange(1, 4097)
"""Places of tokens in a row; texts are shorter."""
_PROMPT_TOKENS = 64


def embed(tokens: Sequence[int]) -> torch.Tensor:
    """`[tokens, WIDTH]` hidden states of token ids."""
    numbers = np.asarray(tokens, dtype=np.int64)[:, None] * (31 * _LANES) + 17 * _LANES
    return torch.from_numpy((numbers % _PRIME).astype(np.float32))


def next_token(output_D: torch.Tensor) -> int:
    """The token that follows an output."""
    return int(output_D.numpy().astype(np.int64) @ _MIX) % VOCABULARY


def _next_hidden(
    block: int, hidden_TD: np.ndarray, positions_T: np.ndarray, start: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys `[T]` of a block's new tokens, and their outputs `[T, WIDTH]`.

    Args:
        block: its number.
        hidden_TD: what enters the block.
        positions_T: rotary positions.
        start: number of tokens before them in the row.
        total: sum of those tokens' keys, each times its place in the row, counted from 1.
    """
    if len(hidden_TD) == 1:  # the same in plain integers, which take a third of the time
        (numbers,), position = hidden_TD.tolist(), int(positions_T[0])
        mixed = sum(n * (mix + block) for n, mix in zip(numbers, _MIX_INTS, strict=True))
        key = (mixed + 7 * position + block) % _PRIME
        total += key * (start + 1)
        outputs = [
            (n * (block + 2) + total * lane + block) % _PRIME
            for lane, n in enumerate(numbers, start=1)
        ]
        return np.array([key]), np.array([outputs])
    keys_T = (hidden_TD @ (_MIX + block) + 7 * positions_T + block) % _PRIME
    totals_T = total + np.cumsum(keys_T * _PLACES[start : start + len(keys_T)])
    return keys_T, (hidden_TD * (block + 2) + totals_T[:, None] * _LANES + block) % _PRIME


def _pass_s(block_s: float, num_blocks: int, num_tokens: int) -> float:
    """Virtual seconds that a pass takes."""
    return num_blocks * block_s * (1 + num_tokens / 20)


class PlainModel:
    """The whole model on one row, without a swarm: what every answer is compared with."""

    def __init__(self, num_blocks: int):
        self._totals = np.zeros((num_blocks, 1), dtype=np.int64)
        """Per block, the sum of keys times places of the first tokens: of none, of one, ..."""
        self.tokens: list[int] = []
        """What the row holds."""

    def copy(self) -> PlainModel:
        """Another row that holds the same."""
        other = PlainModel(0)
        other._totals, other.tokens = self._totals, list(self.tokens)
        return other

    def truncate(self, length: int) -> None:
        """Take tokens back."""
        self._totals = self._totals[:, : length + 1]
        del self.tokens[length:]

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens; their outputs `[tokens, WIDTH]`."""
        hidden_TD = embed(tokens).numpy().astype(np.int64)
        start, end = len(self.tokens), len(self.tokens) + len(tokens)
        positions_T = np.arange(start, end)
        new_BT = np.empty((len(self._totals), len(tokens)), dtype=np.int64)
        for block, total in enumerate(self._totals[:, -1].tolist()):
            keys_T, hidden_TD = _next_hidden(block, hidden_TD, positions_T, start, total)
            new_BT[block] = total + np.cumsum(keys_T * _PLACES[start:end])
        self._totals = np.concatenate([self._totals, new_BT], axis=1)
        self.tokens.extend(tokens)
        return hidden_TD


class IntegerRunner(SpanRunner):
    """A span of the model over pages, whose passes take virtual time.

    Args:
        span: its blocks.
        num_pages: pages of the KV cache.
        page_size: tokens per page.
        loop: whose time passes.
        block_s: what a pass takes per block; a token takes a twentieth of that.
    """

    def __init__(
        self, span: BlockSpan, num_pages: int, page_size: int, loop: VirtualTimeLoop, block_s: float
    ):
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.span = span
        self.hidden_size = WIDTH
        self.bytes_per_token = 8 * len(span)
        self.chunkable = True
        self.states = StateBudget()
        self.batching = Batching.RAGGED
        self.num_pages = num_pages
        self.page_size = page_size
        self.is_fused = False
        self.block_s = block_s
        self._runner = _IntegerPages(span, num_pages, page_size, loop, block_s)


class _IntegerPages:
    """The keys of an `IntegerRunner`, and its passes; a `Runner`."""

    def __init__(
        self, span: BlockSpan, num_pages: int, page_size: int, loop: VirtualTimeLoop, block_s: float
    ):
        self._first_block = span.start
        self._keys = np.zeros((len(span), num_pages, page_size), dtype=np.int64)
        self._loop = loop
        self._block_s = block_s

    def prepare(self, batch: ScheduledBatch) -> None:
        if batch.copies:
            sources, targets = zip(*batch.copies, strict=True)
            self._keys[:, list(targets)] = self._keys[:, list(sources)]
        if batch.cleared_pages:
            self._keys[:, list(batch.cleared_pages)] = 0

    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan,
    ) -> torch.Tensor:
        with np.errstate(invalid="ignore"):  # a hostile hop may send any finite number
            hidden = hidden_TD.numpy().astype(np.int64)
        positions = positions_T.numpy()
        outputs = np.empty(hidden.shape, dtype=np.float32)
        start = 0
        for chunk in chunks:
            part = slice(start, start + chunk.num_tokens)
            outputs[part] = self._run(chunk, hidden[part], positions[part], span)
            start = part.stop
        self._loop.ahead_s += _pass_s(self._block_s, len(span), start)
        return torch.from_numpy(outputs)

    def _run(
        self, chunk: ScheduledChunk, hidden_TD: np.ndarray, positions_T: np.ndarray, span: BlockSpan
    ) -> np.ndarray:
        start, page_size = chunk.start, self._keys.shape[2]
        keys_BS = self._keys[span.start - self._first_block : span.end - self._first_block]
        pages = np.asarray(chunk.pages[: -(-start // page_size)], dtype=np.int64)
        before_BS = keys_BS[:, pages].reshape(len(span), -1)[:, :start]
        totals = (before_BS @ _PLACES[:start]).tolist()
        keys_BS = keys_BS.reshape(len(span), -1)
        slots = np.asarray(chunk.slots, dtype=np.int64)
        for index, block in enumerate(range(span.start, span.end)):
            new_T, hidden_TD = _next_hidden(block, hidden_TD, positions_T, start, totals[index])
            keys_BS[index, slots] = new_T
        return hidden_TD


class LoopWorker(Worker):
    """The worker without its thread: its turns are events of the loop and take virtual time."""

    def __init__(self, runner: SpanRunner, config: EngineConfig, clock: Clock):
        super().__init__(runner, config, clock)
        self._work_clock = clock.monotonic
        self._loop: VirtualTimeLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._free_s = 0.0

    @override
    def start(self) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop):
            raise TypeError("a loop of another kind")
        self._loop = loop

    @override
    def stop(self) -> None:
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()

    @override
    def post(self, command: Callable[[], None]) -> None:
        super().post(command)
        self._wake(0.0)

    def pause(self, until_s: float) -> None:
        """Do nothing until then."""
        self._free_s = max(self._free_s, until_s)

    def _wake(self, wait_s: float) -> None:
        """Take a turn after `wait_s`, or sooner if one is due."""
        if self._loop is None:
            return
        due_s = max(self._free_s, self._loop.time() + wait_s)
        if self._timer is not None:
            if self._timer.when() <= due_s and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._take_turn)

    def _take_turn(self) -> None:
        loop, self._timer = self._loop, None
        if loop is None:
            return
        loop.ahead_s = 0.0
        try:
            with torch.inference_mode():
                self.turn(0.0)
            self._free_s = loop.time() + loop.ahead_s
        finally:
            loop.ahead_s = 0.0
        wait_s = self.due_in_s()
        if wait_s is not None:
            self._wake(wait_s)


class LoopEngine(Engine):
    """An engine in virtual time."""

    worker_type = LoopWorker

    @override
    async def measure(self) -> None:
        """Take the cost of a step and the speed of a prompt from the runner, which knows them."""
        runner, num_blocks = self.runner, len(self.runner.span)
        if not isinstance(runner, IntegerRunner):
            raise TypeError("a runner of another kind")
        all_ms, one_ms = (1000 * _pass_s(runner.block_s, count, 1) for count in (num_blocks, 1))
        cost = StepCost.fit(all_ms, one_ms, num_blocks)
        self._latency = StepLatency(cost, self._clock.monotonic())
        elapsed_s = _pass_s(runner.block_s, num_blocks, _PROMPT_TOKENS)
        self._worker.speed.record(_PROMPT_TOKENS, num_blocks, elapsed_s)

    def pause(self, until_s: float) -> None:
        """Run nothing until then."""
        worker = self._worker
        if isinstance(worker, LoopWorker):
            worker.pause(until_s)
