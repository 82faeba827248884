"""The gateway's own thread: embeds, and makes one batch of all texts that wait for a token.

When texts' hidden states have come back and the thread is free, one call computes norm and head for
all of them, one call samples, and one embeds the chosen tokens. Nobody waits for company.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from planetserve.gateway.client_half import ClientHalf
from planetserve.gateway.sampling import RowSampling, Sampled, TokenLogprob, prompt_logprobs, sample

T = TypeVar("T")

_PROMPT_CHUNK = 128
"""Positions of a prompt whose logits are computed at once: with a large vocabulary, 64 MiB."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a turn gives to the rows of one text."""

    sampled: list[Sampled]
    hidden_ND: torch.Tensor
    """The chosen tokens of one row after another, embedded."""


@dataclass(slots=True)
class _Turn:
    rows: Sequence[RowSampling]
    hidden_ND: torch.Tensor
    positions: Sequence[int]
    done: asyncio.Future[Chosen]


class Turns:
    """Runs what embedding and head have to do. On one event loop; `close` at the end."""

    def __init__(self, half: ClientHalf):
        self._half = half
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planetserve-gateway-head")
        self._waiting: list[_Turn] = []
        self._running: asyncio.Task[None] | None = None

    async def embed(self, ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """A prompt from this position on, as it enters the first layer."""
        return await self._call(lambda: self._half.embed([ids[start:]], [start]))

    async def prompt_logprobs(
        self, hidden_TD: torch.Tensor, ids: Sequence[int], num_top: int
    ) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first, from the last layer's outputs for it."""
        found: list[TokenLogprob] = []
        following = ids[1:]
        for start in range(0, len(following), _PROMPT_CHUNK):
            targets = following[start : start + _PROMPT_CHUNK]
            part_TD = hidden_TD[start : start + len(targets)]
            found += await self._call(
                lambda part_TD=part_TD, targets=targets: prompt_logprobs(  # type: ignore[misc]
                    self._half.logits(part_TD), targets, num_top
                )
            )
        return found

    async def choose(
        self, rows: Sequence[RowSampling], hidden_ND: torch.Tensor, positions: Sequence[int]
    ) -> Chosen:
        """The next token of each row.

        Args:
            rows: their sampling.
            hidden_ND: the last layer's outputs for their last tokens.
            positions: of the first token that is chosen for each row.
        """
        done: asyncio.Future[Chosen] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Turn(rows, hidden_ND, positions, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await done

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                turns, self._waiting = self._waiting, []
                turns = [turn for turn in turns if not turn.done.done()]  # some are cancelled
                if turns:
                    await self._run_together(turns)
        finally:
            self._running = None

    async def _run_together(self, turns: Sequence[_Turn]) -> None:
        try:
            results = await self._call(lambda: _compute(self._half, turns))
        except Exception as error:  # noqa: BLE001 - every text gets it
            for turn in turns:
                if not turn.done.done():
                    turn.done.set_exception(error)
            return
        for turn, result in zip(turns, results, strict=True):
            if not turn.done.done():
                turn.done.set_result(result)

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _compute(half: ClientHalf, turns: Sequence[_Turn]) -> list[Chosen]:
    logits_NV = half.logits(torch.cat([turn.hidden_ND for turn in turns]))
    sampled = sample(logits_NV, [row for turn in turns for row in turn.rows])
    positions = [position for turn in turns for position in turn.positions]
    hidden_ND = half.embed(
        [[token] for one in sampled for token in one.tokens],
        [
            position + place
            for position, one in zip(positions, sampled, strict=True)
            for place in range(len(one.tokens))
        ],
    )
    results, start, place = [], 0, 0
    for turn in turns:
        own = sampled[start : start + len(turn.rows)]
        num_tokens = sum(len(one.tokens) for one in own)
        results.append(Chosen(own, hidden_ND[place : place + num_tokens]))
        start += len(turn.rows)
        place += num_tokens
    return results
