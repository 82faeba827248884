"""The engine: a span of blocks on its own thread, and the interface for the server's event loop.

The loop's thread opens sessions, submits steps and closes sessions; none of these calls waits.
`worker.py` runs on the engine thread. KV reservations, futures and queue limits belong to the
loop's thread; the scheduler, pages and tensors to the engine thread. Commands go through one queue,
in order, so the pages of a closed session are free before a session that is opened later needs
them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import ClassVar

import torch

from planetserve.clock import Clock
from planetserve.engine.batch_totals import BatchTotals
from planetserve.engine.config import EngineConfig, EngineStats
from planetserve.engine.job import Job
from planetserve.engine.measure import measure_cost
from planetserve.engine.span_runner import SpanRunner
from planetserve.engine.worker import Worker
from planetserve.errors import (
    QueueFull,
    RemoteProtocolError,
    SessionClosed,
    SessionError,
    SessionLengthError,
)
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.kv_reservations import KvReservations
from planetserve.scheduler.speed import StepLatency
from planetserve.types import BlockSpan
from planetserve.wire.step import StepTable


class Engine:
    """Serves the span of `runner` to many sessions at once.

    All methods are for one thread, the event loop's, unless they say otherwise.
    """

    worker_type: ClassVar[Callable[..., Worker]] = Worker

    def __init__(self, runner: SpanRunner, config: EngineConfig, clock: Clock):
        self.runner = runner
        self.config = config
        self._reservations = KvReservations(
            runner.num_pages,
            runner.page_size,
            clock,
            max_peer_share=config.max_peer_share,
            overcommit=config.kv_overcommit if runner.can_preempt else 1.0,
            state_pages=runner.states.pages,
        )
        # Per open session, its unfinished steps and how many tokens each has.
        self._pending: dict[bytes, dict[asyncio.Future[torch.Tensor], int]] = {}
        self._num_blocks: dict[bytes, int] = {}
        most = (runner.num_pages - runner.states.pages) * runner.page_size
        self._max_length = min(config.inference_max_length, most)
        self._num_items = 0
        self._clock = clock
        self._latency: StepLatency | None = None
        self._worker = self.worker_type(runner, config, clock)
        self._is_started = False
        self._is_closed = False

    @property
    def max_length(self) -> int:
        """Most tokens in a row of a session."""
        return self._max_length

    def start(self) -> None:
        """Start the engine thread."""
        if self._is_started or self._is_closed:
            raise SessionError("an engine can be started once")
        self._is_started = True
        self._worker.start()

    def close(self) -> None:
        """Stop the thread after its current tick and fail pending steps with `SessionClosed`."""
        self._is_closed = True
        self._worker.stop()
        for session_id in list(self._pending):
            self.close_session(session_id)

    def open_session(
        self,
        session_id: bytes,
        peer_id: str,
        num_rows: int,
        max_length: int,
        span: BlockSpan | None = None,
    ) -> None:
        """Admit a session of `num_rows` rows of up to `max_length` tokens.

        Its steps pass the blocks of `span`, by default all that are loaded.

        Raises:
            RemoteProtocolError: `span` is not within the loaded blocks.
            SessionLengthError: longer than the server's `inference_max_length`.
            CacheExhausted: the pages are not free; says when to ask again.
            SessionError: the id is in use.
            SessionClosed: the engine is closing.
        """
        span = span or self.runner.span
        if not self.runner.span.covers(span):
            raise RemoteProtocolError(
                f"blocks {span} are not all served here: {self.runner.span} are"
            )
        self._check_length(max_length)
        if self._is_closed:
            raise SessionClosed("this server is shutting down")
        self._note_shortage()
        self._reservations.open(session_id, peer_id, num_rows, max_length)
        self._pending[session_id] = {}
        self._num_blocks[session_id] = len(span)
        self._worker.post(functools.partial(self._worker.open, session_id, num_rows, span, peer_id))

    def over_share(self, peer_id: str, num_rows: int, max_length: int) -> list[bytes]:
        """Sessions that must end before `peer_id` can have a session of this size within its share.

        See `KvReservations.over_share`.
        """
        self._note_shortage()
        return self._reservations.over_share(peer_id, num_rows, max_length)

    def close_session(self, session_id: bytes) -> None:
        """Drop a session: its pages are free after the current tick, its pending steps fail.

        Closing twice, or a session that never was, does nothing.
        """
        pending = self._pending.pop(session_id, None)
        if pending is None:
            return
        del self._num_blocks[session_id]
        self._reservations.close(session_id)
        for future in pending:
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(SessionClosed("the session was closed"))
                future.exception()  # nobody has to wait for a step of a session they closed
        self._worker.post(functools.partial(self._worker.forget, session_id))

    def reserve(self, session_id: bytes, num_tokens: int) -> None:
        """Lease room for a step of so many tokens, of which only a part is here.

        Raises:
            SessionError: no such session.
            CacheExhausted: past what the session leased, with nothing left to lease.
        """
        self._note_shortage()
        self._reservations.ensure_tokens(session_id, num_tokens)

    def leased_tokens(self, session_id: bytes) -> int:
        """Tokens that a session may hold, all rows together; 0 after it was closed."""
        return self._reservations.leased_tokens(session_id)

    def submit(
        self,
        session_id: bytes,
        table: StepTable,
        hidden_TD: torch.Tensor,
        output: asyncio.Future[torch.Tensor] | None = None,
    ) -> asyncio.Future[torch.Tensor]:
        """Queue a step behind the session's earlier ones.

        Args:
            session_id: an open session.
            table: which tokens of which rows.
            hidden_TD: `[table.num_tokens, hidden]`; must never be changed: it may be kept for as
                long as the session, in case its KV cache has to be computed again.
            output: a future of the caller's that is returned; by default a new one.

        Returns:
            A future of the span's output in the same layout, on the CPU in the span's dtype. It may
            fail with SessionError (positions that do not fit), RemoteProtocolError (numbers that
            are not finite), RemoteError (the pass failed; the session is lost), CacheExhausted
            (pages were promised to too many; the session is lost) or SessionClosed.

        Raises:
            SessionError: no such session.
            SessionLengthError: past the server's `inference_max_length`.
            CacheExhausted: past what the session leased, with nothing left to lease.
            QueueFull: too many unfinished steps.
            RemoteProtocolError: the tensor's shape does not fit the table or the model.
        """
        pending = self._pending.get(session_id)
        if pending is None:
            raise SessionError("no session with this id is open here")
        length = max((chunk.end for chunk in table.rows), default=0)
        self._check_length(length)
        num_tokens = table.num_tokens
        if tuple(hidden_TD.shape) != (num_tokens, self.runner.hidden_size):
            raise RemoteProtocolError(
                f"a step of {num_tokens} tokens needs a tensor of "
                f"{num_tokens} x {self.runner.hidden_size}, got {tuple(hidden_TD.shape)}"
            )
        self._note_shortage()
        self._reservations.ensure(session_id, length)
        queued = sum(pending.values())
        # Twice, because a session that moves here sends its whole history, and with it tokens that
        # the next step cuts.
        most = 2 * self._reservations.leased_tokens(session_id)
        if len(pending) >= self.config.max_queued_steps or (queued and queued + num_tokens > most):
            raise QueueFull("the session has too many unfinished steps; wait for their results")
        future = output or asyncio.get_running_loop().create_future()
        pending[future] = num_tokens
        item = StepRequest(self._num_items, session_id, table.rows, table.reorder)
        self._num_items += 1
        job = Job(item, table.positions, hidden_TD, future, self._clock.monotonic())
        num_blocks = self._num_blocks[session_id] if table.is_decode else 0

        def on_done(done: asyncio.Future[torch.Tensor]) -> None:
            del pending[done]
            if num_blocks:
                self._on_decoded(job, num_blocks, done)

        future.add_done_callback(on_done)
        self._worker.post(functools.partial(self._worker.accept, job))
        return future

    def stats(self) -> EngineStats:
        """What the engine holds and how fast it has been lately."""
        usage = self._worker.usage
        self._note_shortage()
        num_slots = usage.pages * self.runner.page_size
        latency = self._latency
        return EngineStats(
            pages_total=self.runner.num_pages,
            pages_used=usage.pages,
            live_tokens=usage.live_tokens,
            kv_useful_share=usage.live_tokens / num_slots if num_slots else 1.0,
            pages_leased=self._reservations.leased_pages,
            free_cache_tokens=self._reservations.free_tokens,
            num_sessions=len(self._pending),
            queued_tokens=usage.queued_tokens,
            sessions_waiting=usage.sessions_waiting,
            preemptions=usage.preemptions,
            recomputed_tokens=usage.recomputed_tokens,
            kept_input_bytes=usage.kept_input_bytes,
            decode_ms_per_block=self.decode_ms_per_block,
            alone_ms_per_block=latency.alone_ms_per_block if latency else 0.0,
            overhead_ms=latency.overhead_ms if latency else 0.0,
            tokens_per_s_per_block=self._worker.speed.tokens_per_s_per_block,
        )

    @property
    def batch_totals(self) -> BatchTotals:
        """What has run since the start."""
        return self._worker.totals

    @property
    def decode_ms_per_block(self) -> float:
        """As in `stats`."""
        latency = self._latency
        return latency.ms_per_block(self._clock.monotonic()) if latency else 0.0

    def count_handling(self, elapsed_ms: float) -> None:
        """Record the time of a decode step outside the engine."""
        if self._latency is not None:
            self._latency.add_handling(elapsed_ms)

    async def measure(self) -> None:
        """Time a short prompt and a few single steps, for less than a second or so.

        Call it after `start` and before the first session. The cache is empty again afterwards.

        Raises:
            SessionError: the engine is not running, or has sessions.
            RemoteError: the pass failed.
        """
        if not self._is_started or self._is_closed or self._pending:
            raise SessionError("measure an engine that is started and has no sessions")
        cost = await measure_cost(self._worker, self.runner, self._clock, self._max_length)
        self._latency = StepLatency(cost, self._clock.monotonic())

    def _on_decoded(self, job: Job, num_blocks: int, done: asyncio.Future[torch.Tensor]) -> None:
        if self._latency is None or done.cancelled() or done.exception() is not None:
            return
        now_s = self._clock.monotonic()
        self._latency.add(
            1000 * (now_s - job.submitted_s), num_blocks, alone=job.ran_alone, now_s=now_s
        )

    def _note_shortage(self) -> None:
        self._reservations.is_short = self._worker.usage.sessions_waiting > 0

    def _check_length(self, length: int) -> None:
        if length > self._max_length:
            raise SessionLengthError(
                f"{length} tokens are more than the {self._max_length} that this server allows "
                "in a session"
            )
