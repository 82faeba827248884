"""A model of a few integers per token, exact in float32: in pages as an engine keeps it, and plain.

Every block mixes a token with all tokens before it by their place, so a token that lies in a wrong
page, comes twice, is lost or was taken back and not forgotten changes every output after it.
"""

from __future__ import annotations

import asyncio
import itertools
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
from planetserve.testing.virtual_time import VirtualTimeLoop
from planetserve.types import BlockSpan

WIDTH = 4
VOCABULARY = 97
_PRIME = 8191
_MIX = np.array([1, 3, 5, 7])
_LANES = np.arange(1, WIDTH + 1)
_PLACES = np.arange(1, 4097)
"""Longer texts than that are not simulated."""


def embed(tokens: Sequence[int]) -> torch.Tensor:
    """`[tokens, WIDTH]` hidden states of token ids."""
    numbers = np.asarray(tokens, dtype=np.int64)[:, None] * (31 * _LANES) + 17 * _LANES
    return torch.from_numpy((numbers % _PRIME).astype(np.float32))


def next_token(output_D: torch.Tensor) -> int:
    """The token that follows an output."""
    return int(output_D.numpy().astype(np.int64) @ _MIX) % VOCABULARY


def _keys(block: int, hidden_TD: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
    return (hidden_TD @ (_MIX + block) + 7 * positions_T + block) % _PRIME


def _outputs(block: int, hidden_TD: np.ndarray, keys_T: np.ndarray, start: int) -> np.ndarray:
    """Outputs of the tokens from `start` on, of which `keys_T` has all."""
    sums_T = np.cumsum(keys_T * _PLACES[: len(keys_T)])[start:]
    return (hidden_TD * (block + 2) + sums_T[:, None] * _LANES + block) % _PRIME


class PlainModel:
    """The whole model on one row, without a swarm: what every answer is compared with."""

    def __init__(self, num_blocks: int):
        self._keys = [np.empty(0, dtype=np.int64) for _ in range(num_blocks)]
        self.tokens: list[int] = []
        """What the row holds."""

    def copy(self) -> PlainModel:
        """Another row that holds the same."""
        other = PlainModel(0)
        other._keys, other.tokens = list(self._keys), list(self.tokens)
        return other

    def truncate(self, length: int) -> None:
        """Take tokens back."""
        self._keys = [keys[:length] for keys in self._keys]
        del self.tokens[length:]

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens; their outputs `[tokens, WIDTH]`."""
        hidden_TD = embed(tokens).numpy().astype(np.int64)
        start = len(self.tokens)
        positions_T = np.arange(start, start + len(tokens))
        for block, known in enumerate(self._keys):
            keys_T = np.concatenate([known, _keys(block, hidden_TD, positions_T)])
            self._keys[block] = keys_T
            hidden_TD = _outputs(block, hidden_TD, keys_T, start)
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
        self.batching = Batching.RAGGED
        self.num_pages = num_pages
        self.page_size = page_size
        self.is_fused = False
        self._state = np.zeros((len(span), num_pages, page_size), dtype=np.int64)
        self._loop = loop
        self._block_s = block_s

    @override
    def prepare(self, batch: ScheduledBatch) -> None:
        if batch.copies:
            sources, targets = zip(*batch.copies, strict=True)
            self._state[:, list(targets)] = self._state[:, list(sources)]
        if batch.cleared_pages:
            self._state[:, list(batch.cleared_pages)] = 0

    @override
    def forward(
        self,
        chunks: Sequence[ScheduledChunk],
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor,
        span: BlockSpan | None = None,
    ) -> torch.Tensor:
        span = span or self.span
        with np.errstate(invalid="ignore"):  # a hostile hop may send any finite number
            hidden = hidden_TD.numpy().astype(np.int64)
        positions = positions_T.numpy()
        ends = list(itertools.accumulate(chunk.num_tokens for chunk in chunks))
        outputs = np.empty_like(hidden)
        for chunk, end in zip(chunks, ends, strict=True):
            part = slice(end - chunk.num_tokens, end)
            outputs[part] = self._run(chunk, hidden[part], positions[part], span)
        self._loop.ahead_s += len(span) * self._block_s * (1 + ends[-1] / 20)
        return torch.from_numpy(outputs.astype(np.float32))

    def _run(
        self, chunk: ScheduledChunk, hidden_TD: np.ndarray, positions_T: np.ndarray, span: BlockSpan
    ) -> np.ndarray:
        pages = np.asarray(chunk.pages, dtype=np.int64)
        slots = (pages[:, None] * self.page_size + np.arange(self.page_size)).ravel()[: chunk.end]
        new = np.asarray(chunk.slots, dtype=np.int64)
        for block in range(span.start, span.end):
            memory = self._state[block - self.span.start].reshape(-1)
            memory[new] = _keys(block, hidden_TD, positions_T)
            hidden_TD = _outputs(block, hidden_TD, memory[slots], chunk.start)
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

    def pause(self, until_s: float) -> None:
        """Run nothing until then."""
        worker = self._worker
        if isinstance(worker, LoopWorker):
            worker.pause(until_s)
