"""Generates many texts at once on one event loop: the client core of the gateway.

Each prompt is one session on a chain of servers (`client/session_core.py`), whose rows are its
answers; the prompt is computed once. Between two steps of a session its rows go through
`batch_thread.py`, together with those of all others that have come back. A text that is cancelled
closes its session on every hop at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

import torch
from tokenizers import Tokenizer

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.session_core import SessionCore
from planetserve.errors import QueueFull
from planetserve.gateway.batch_thread import Turns
from planetserve.gateway.chain_timer import ChainTimer
from planetserve.gateway.metrics import Metrics
from planetserve.gateway.text import (
    Failed,
    Outputs,
    PromptLogprobs,
    Row,
    TextRequest,
    TextTimes,
)
from planetserve.gateway.warm_sessions import WarmSessions
from planetserve.wire.step import RowSlice, StepTable

_LEAST_ROOM = 256
"""Tokens of an answer for which room is waited for, when servers have less at the moment."""
_FULL_RETRY_S = 2.0


class TextSlots:
    """Room for so many texts at once; the others wait in the order in which they came.

    Args:
        num_texts: that run at once.
        max_waiting: prompts that wait.
    """

    def __init__(self, num_texts: int, max_waiting: int):
        self.num_free = num_texts
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_room(self, num_prompts: int, num_texts: int) -> None:
        """Refuse a request that would neither start nor fit among those that wait.

        Raises:
            QueueFull: it would not.
        """
        starts = not self._waiting and num_texts <= self.num_free
        if not starts and self.num_waiting + num_prompts > self._max_waiting:
            raise QueueFull(
                f"{self.num_waiting} prompts wait already; try again later", _FULL_RETRY_S
            )

    @contextlib.asynccontextmanager
    async def take(self, num_texts: int) -> AsyncIterator[None]:
        """Hold room for so many texts."""
        if self._waiting or num_texts > self.num_free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((num_texts, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(num_texts)
                else:
                    with contextlib.suppress(ValueError):  # passed over meanwhile
                        self._waiting.remove((num_texts, turn))
                    self._give_back(0)
                raise
        else:
            self.num_free -= num_texts
        try:
            yield
        finally:
            self._give_back(num_texts)

    def _give_back(self, num_texts: int) -> None:
        self.num_free += num_texts
        while self._waiting and self._waiting[0][0] <= self.num_free:
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self.num_free -= wanted
                turn.set_result(None)


class TextEngine:
    """Runs texts. On the event loop of `manager`.

    Args:
        manager: finds chains.
        turns: embeds, and chooses tokens.
        tokenizer: decodes; nobody else may change its settings.
        slots: how many texts run at once.
        warm: keeps sessions of texts that have ended.
        metrics: counts.
    """

    def __init__(
        self,
        manager: ChainManager,
        turns: Turns,
        tokenizer: Tokenizer,
        slots: TextSlots,
        warm: WarmSessions,
        metrics: Metrics,
    ):
        self.slots = slots
        self._warm = warm
        self._manager = manager
        self._turns = turns
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()
        metrics.watch_waiting(lambda: slots.num_waiting)

    def room(self, num_rows: int, num_prompt_tokens: int) -> int | None:
        """Tokens of prompt and answer for which servers have room now, or would have without the
        sessions that are kept; None if there is no chain."""
        least = num_prompt_tokens + _LEAST_ROOM + self._warm.reserved_tokens // num_rows
        return self._manager.longest_session(num_rows, least)

    @contextlib.asynccontextmanager
    async def run(self, requests: Sequence[TextRequest]) -> AsyncIterator[Outputs]:
        """Generate the answers to some prompts; those that are not done at the end of the block
        are cancelled. Answer `i` of prompt `p` has the index `p * n + i`.

        Raises:
            QueueFull: too many wait.
        """
        self.slots.check_room(len(requests), sum(request.n for request in requests))
        outputs = Outputs()
        tasks = []
        first = 0
        for number, request in enumerate(requests):
            tasks.append(asyncio.create_task(self._run_text(number, first, request, outputs)))
            first += request.n
        self._running.update(tasks)
        for task in tasks:
            task.add_done_callback(self._running.discard)
        try:
            yield outputs
        finally:
            await self._end(tasks)

    async def close(self) -> None:
        """Cancel what runs; returns when the servers have been told."""
        await self._end(list(self._running))

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            # Twice would interrupt what tells the servers; so would a caller that is cancelled
            # while it waits here, as the web framework does over and over.
            if not task.cancelling():
                task.cancel()
        if tasks:
            await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))

    async def _run_text(
        self, number: int, first: int, request: TextRequest, outputs: Outputs
    ) -> None:
        times = TextTimes()
        reasons: list[str] = []
        try:
            async with self.slots.take(request.n):
                times.started_s = time.monotonic()
                with self._metrics.running(request.n):
                    await self._generate(number, first, request, outputs, times, reasons)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            reasons += ["error"] * (request.n - len(reasons))
            outputs.put(Failed(error))
        except asyncio.CancelledError:
            reasons += ["abort"] * (request.n - len(reasons))
            raise
        finally:
            self._metrics.text_ended(request, times, reasons)

    async def _generate(
        self,
        number: int,
        first: int,
        request: TextRequest,
        outputs: Outputs,
        times: TextTimes,
        reasons: list[str],
    ) -> None:
        ids = request.prompt_ids
        held_ids, is_whole = list(ids), False
        session, num_cached = await self._session(request)
        timer = ChainTimer(
            self._manager, session, self._metrics.step_done, first, request.reports_chain
        )
        try:
            rows = [
                Row(row, first + row, request, self._tokenizer, num_cached)
                for row in range(request.n)
            ]
            hidden_TD = await self._turns.embed(ids, num_cached)
            table = StepTable((RowSlice(0, num_cached, len(ids) - num_cached),))
            keep_last = request.prompt_logprobs is None
            session.prepare_step(request.n, table, hidden_TD)
            with timer.prompt():
                output_TD = await session.run(request.n, table, hidden_TD, keep_last=keep_last)
            self._metrics.prompt_done(len(ids))
            if request.prompt_logprobs is not None:
                found = await self._turns.prompt_logprobs(output_TD, ids, request.prompt_logprobs)
                outputs.put(PromptLogprobs(number, tuple(found)))
            hidden_ND = output_TD[-1:].expand(request.n, -1)
            # The prompt is in row 0; the others become copies of it with the first token.
            reorder = (0,) * request.n if request.n > 1 else None
            while True:
                with timer.head():
                    chosen = await self._turns.choose(
                        [row.sampling for row in rows], hidden_ND, [row.num_held for row in rows]
                    )
                alive, places, start, num_new = [], list[int](), 0, 0
                for row, sampled in zip(rows, chosen.sampled, strict=True):
                    delta = row.add(sampled)
                    outputs.put(delta)
                    num_new += len(delta.tokens)
                    end = start + len(sampled.tokens)
                    if delta.finish_reason is None:
                        alive.append((row, len(sampled.tokens)))
                        places += range(start, end)
                    else:
                        reasons.append("length" if delta.finish_reason == "length" else "stop")
                    start = end
                self._metrics.tokens_done(num_new, times)
                timer.report_to(outputs.put, is_last=not alive)
                if not alive:
                    is_whole = request.n == 1
                    return
                rows = [row for row, _ in alive]
                hidden_TD = chosen.hidden_ND
                if len(places) < len(hidden_TD):
                    hidden_TD = hidden_TD[torch.tensor(places)]
                with timer.step():
                    hidden_ND = await self._step(session, request.n, alive, hidden_TD, reorder)
                held_ids += chosen.sampled[0].tokens  # wanted only if there is one row
                reorder = None
        finally:
            if is_whole and not session.closed:
                self._warm.keep(request.owner, held_ids, session, request.lease_tokens)
            else:
                # Also when this is cancelled: the servers' memory is free at once.
                await asyncio.shield(session.release())

    async def _session(self, request: TextRequest) -> tuple[SessionCore, int]:
        """A session for a text, and how many tokens of its prompt that holds already."""
        if request.n == 1 and request.prompt_logprobs is None:
            taken = self._warm.take(request.owner, request.prompt_ids)
            if taken is not None:
                taken[0].expect(request.lease_tokens)
                return taken
        # A refusal would cost seconds. Records may not tell yet of what is kept.
        room = self._manager.longest_session(request.n, 0) or 0
        await self._warm.make_room((room - request.lease_tokens) * request.n)
        return SessionCore(self._manager, lease_tokens=request.lease_tokens), 0

    @staticmethod
    async def _step(
        session: SessionCore,
        num_rows: int,
        rows: Sequence[tuple[Row, int]],
        hidden_TD: torch.Tensor,
        reorder: tuple[int, ...] | None,
    ) -> torch.Tensor:
        """The new tokens of each row, nearly always one, through the chain; returns the outputs for
        the last of each row."""
        slices = tuple(RowSlice(row.number, row.num_held, number) for row, number in rows)
        table = StepTable(slices, None, reorder)
        session.prepare_step(num_rows, table, hidden_TD)
        keep_last = not table.is_decode
        output_TD = await session.run(num_rows, table, hidden_TD, keep_last=keep_last)
        for row, number in rows:
            row.num_held += number
        return output_TD[table.last_tokens()] if keep_last else output_TD
