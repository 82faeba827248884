"""What runs on the engine thread: commands in, one batch after the other, results out.

A `Worker` owns the scheduler, the jobs, the pages and the device. `post` is the only method for
other threads; a posted command runs on the engine thread, in order, before the next batch. Results
go back through `loop.call_soon_threadsafe`, one wake-up per tick. A failing pass fails only the
sessions whose steps fail when run alone, and never the thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from planetserve.clock import Clock
from planetserve.engine.batch_totals import BatchTotals
from planetserve.engine.config import EngineConfig
from planetserve.engine.job import Job, Results
from planetserve.engine.passes import token_rows
from planetserve.engine.pinned_copy import integers, to_device, to_host
from planetserve.engine.recompute_inputs import KeptInputs
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import (
    CacheExhausted,
    PlanetServeError,
    RemoteError,
    RemoteProtocolError,
    SessionError,
)
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk
from planetserve.scheduler.batch_delay import BatchDelay
from planetserve.scheduler.prefill_budget import PrefillBudget
from planetserve.scheduler.scheduler import Ready, Scheduler, SchedulerConfig
from planetserve.scheduler.segments import segments, separate
from planetserve.scheduler.speed import PassSpeed
from planetserve.tensors import is_finite
from planetserve.types import BlockSpan

logger = logging.getLogger(__name__)

_IDLE_S = 2.0
"""A session whose last step was done so long ago gives up its pages to those that wait for some."""
_STUCK_S = 0.25


class Usage(NamedTuple):
    """What the scheduler holds."""

    pages: int = 0
    live_tokens: int = 0
    queued_tokens: int = 0
    sessions_waiting: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    kept_input_bytes: int = 0


class PassTime(NamedTuple):
    """What went through how many blocks, on average through each, and for how long."""

    num_tokens: float = 0.0
    num_blocks: int = 0
    elapsed_s: float = 0.0


class Worker:
    """The engine thread's state and loop. `start` before use, `stop` after."""

    def __init__(self, runner: SpanRunner, config: EngineConfig, clock: Clock):
        self._runner = runner
        self._config = config
        self._clock = clock
        # Written in C: a condition of Python's takes several times as long to hand a step over.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        preempts = config.kv_overcommit > 1 and runner.can_preempt
        self._scheduler = Scheduler(
            SchedulerConfig(
                runner.num_pages,
                runner.page_size,
                config.max_batch_tokens,
                policy=config.scheduling_policy,
                chunkable=runner.chunkable,
                preempts=preempts,
                max_owner_share=config.max_peer_share,
                states=runner.states,
            )
        )
        self._inputs = KeptInputs() if preempts or runner.states.pages else None
        self._finished_s: dict[bytes, float] = {}
        """When each session's latest step was done."""
        self._waiting_since_s: dict[bytes, float] = {}
        self._is_stuck = False
        """Whether all steps wait for pages that only a command can free."""
        self._prefill_budget = PrefillBudget(config.max_batch_tokens, config.prefill_slowdown)
        self._batch_delay = BatchDelay(config.batch_delay_factor if runner.is_paged else 0.0)
        self._gather_s = 0.0
        """How long the next pass waits for decode steps that are about to come."""
        self._has_waited = False
        # What other programs take of a CPU while a batch runs says nothing about the batch.
        is_cpu = runner.device.type == "cpu"
        self._work_clock = time.thread_time if is_cpu else clock.monotonic
        self._spans: dict[bytes, BlockSpan] = {}
        self._jobs: dict[int, Job] = {}
        self._results = Results()
        self._last_pass = PassTime()
        self.speed = PassSpeed()
        """Written on the engine thread, read anywhere."""
        self._idle_since_s = 0.0
        self._usage = Usage()
        self.totals = BatchTotals()
        self._thread: threading.Thread | None = None

    @property
    def usage(self) -> Usage:
        """As of the last tick. For any thread."""
        return self._usage

    def post(self, command: Callable[[], None]) -> None:
        """Have `command` run on the engine thread. For any thread; never waits."""
        self._commands.put(command)

    def start(self) -> None:
        """Begin to serve, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="planetserve-engine")
        self._thread.start()

    def stop(self) -> None:
        """End after the current turn, and return then; later commands never run."""
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # Everything from here on is for the engine thread alone.

    def _run(self) -> None:
        """The thread's target: serve until `stop`."""
        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)
        with torch.inference_mode():
            while self.turn(self.due_in_s()):
                pass

    def due_in_s(self) -> float | None:
        """Seconds until the next turn is due if no command comes; None: not before one comes."""
        if self._is_stuck and self._scheduler.waiting:
            # A session that waits for pages may get them later, from sessions that go idle.
            return _STUCK_S
        if self._gather_s > 0:
            return self._gather_s
        return None if self._is_stuck or not self._scheduler.has_work else 0.0

    def turn(self, wait_s: float | None) -> bool:
        """Carry out commands and run one batch; False when the engine is closing.

        Args:
            wait_s: how long to wait for a command, if there is none; None: until one comes.
        """
        # A function of its own, so that nothing of the last turn is held while waiting.
        commands = self._wait_for_work(wait_s)
        if commands is None:
            return False
        for step in (*commands, self._tick, self._publish):
            try:
                step()
            except Exception:  # a bug here must not silence every other session
                logger.exception("the engine failed; sessions with steps are dropped")
                self._drop_busy_sessions()
        return True

    def _wait_for_work(self, wait_s: float | None) -> list[Callable[[], None]] | None:
        """New commands; none if `wait_s` passes without; None when the engine is closing."""
        commands = []
        may_wait = wait_s != 0
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(may_wait, wait_s)
                if command is None:
                    return None
                commands.append(command)
                may_wait = self._is_stuck = False
        return commands

    def open(self, session_id: bytes, num_rows: int, span: BlockSpan, owner: str = "") -> None:
        """Start a session over `span` whose pages have been leased to `owner`."""
        self._scheduler.open(session_id, num_rows, owner)
        if self._inputs is not None:
            self._inputs.open(session_id, num_rows)
        self._batch_delay.open(session_id, span)
        self._spans[session_id] = span

    def accept(self, job: Job) -> None:
        """Queue a step; one that does not fit its session fails at once."""
        if self._config.check_finite and not is_finite(job.hidden_TD):
            error = RemoteProtocolError("the step's hidden states are not all finite numbers")
            self._results.add(job, error)
            return
        try:
            self._scheduler.add(job.item)
        except SessionError as error:
            self._results.add(job, error)
        else:
            self._batch_delay.returned(job.item.session_id, job.submitted_s)
            self._jobs[job.item.item_id] = job

    def forget(self, session_id: bytes) -> None:
        """Free a session's pages and drop its steps."""
        self._spans.pop(session_id, None)
        self._prefill_budget.forget(session_id)
        self._batch_delay.forget(session_id)
        self._forget_inputs(session_id)
        for item_id in self._scheduler.close(session_id):
            del self._jobs[item_id]

    def _tick(self) -> None:
        ready = self._scheduler.ready()
        self._gather_s = self._wait_for_company(ready)
        if self._gather_s:
            return
        started_s = self._work_clock()
        max_prefill = None
        if ready.prefilling:
            max_prefill = self._prefill_budget.tokens(
                self._clock.monotonic(), ready.prefilling, sum(ready.decoding.values())
            )
        batch = self._scheduler.schedule(max_prefill, self._idle_sessions())
        if self._inputs is not None:
            self._keep_house(batch)
        try:
            self._runner.prepare(batch)
        except Exception as error:  # noqa: BLE001 - kernels may raise anything
            for session_id in {chunk.session_id for chunk in batch.chunks}:
                self._drop(session_id, error)
            return
        if not batch.chunks:
            return
        try:
            self._forward(batch.chunks)
        except Exception as error:  # noqa: BLE001 - as above, and so may a family's code
            self._isolate(batch.chunks, error)
        work_s = self._work_clock() - started_s
        # A step that has waited, even in vain, does not say what one takes that meets nobody.
        is_single = len({chunk.session_id for chunk in batch.chunks}) == 1 and not self._has_waited
        self._has_waited = False
        finished = [self._jobs.pop(item_id) for item_id in self._scheduler.commit(batch)]
        for job in finished:
            job.ran_alone = is_single and job.submitted_s >= self._idle_since_s
            whole = job.outputs[0] if len(job.outputs) == 1 else torch.cat(job.outputs)
            self._results.add(job, whole)
        self._idle_since_s = now_s = self._clock.monotonic()
        self.totals.add(batch.num_tokens, batch.num_prefill_tokens, work_s)
        self._publish()  # whoever waits should not wait for the book-keeping
        self._expect(batch, finished, now_s)
        if self._inputs is not None:
            for job in finished:
                self._inputs.extend(job.item.session_id, job.table, job.hidden_TD)
                self._finished_s[job.item.session_id] = now_s
        self._prefill_budget.record(
            batch.decoding,
            batch.num_tokens - batch.num_prefill_tokens,
            batch.num_prefill_tokens,
            work_s,
            now_s,
        )

    def _wait_for_company(self, ready: Ready) -> float:
        """Seconds until decode steps that are worth waiting for are here or late."""
        if not ready.decoding or ready.prefilling or self._scheduler.waiting:
            return 0.0
        wait_s = self._batch_delay.wait_s(ready.decoding, self._clock.monotonic())
        self._has_waited |= wait_s > 0
        return wait_s

    def _expect(self, batch: ScheduledBatch, finished: Sequence[Job], now_s: float) -> None:
        """Note what the batch says about the steps that come next."""
        if not batch.num_prefill_tokens:
            self._batch_delay.record(*self._last_pass)
        token_rate = self.speed.tokens_per_s_per_block
        slope_s = 1 / token_rate if token_rate else 0.0
        decoding = set(batch.decoding)
        ids = [job.item.session_id for job in finished]
        self._batch_delay.answered([key for key in ids if key in decoding], now_s, slope_s)

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Run chunks through the spans of their sessions and hand the outputs to jobs."""
        hidden = []
        positions = array("q")
        for chunk in chunks:
            num_new = chunk.num_tokens - chunk.num_restored
            if chunk.num_restored and self._inputs is not None:
                known_TD, known = self._inputs.read(chunk)
                hidden.append(known_TD)
                positions.extend(known)
                if not num_new:
                    continue
            job, end = self._jobs[chunk.item_id], chunk.offset + num_new
            hidden.append(job.hidden_TD[chunk.offset : end])
            if job.positions is None:
                positions.extend(range(chunk.end - num_new, chunk.end))
            else:
                positions.extend(job.positions[chunk.offset : end])
        hidden_TD = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        output_TD = self._pass(chunks, hidden_TD, positions)
        # A view would keep everyone's output alive for as long as anyone holds theirs.
        is_shared = chunks[0].item_id != chunks[-1].item_id
        start = 0
        for chunk in chunks:
            own_TD = output_TD[start + chunk.num_restored : start + chunk.num_tokens]
            if len(own_TD):
                is_part = is_shared or chunk.num_restored > 0
                self._jobs[chunk.item_id].outputs.append(own_TD.clone() if is_part else own_TD)
            start += chunk.num_tokens

    def _pass(
        self, chunks: Sequence[ScheduledChunk], hidden_TD: torch.Tensor, positions: array[int]
    ) -> torch.Tensor:
        """What leaves the chunks' spans; chunks share a pass wherever their spans overlap."""
        runner = self._runner
        spans = [self._spans[chunk.session_id] for chunk in chunks]
        # A plain cache belongs to one sequence and one span: nothing to share, nothing to cut.
        passes = segments(spans) if runner.is_paged else separate(spans)
        started_s = self._clock.monotonic()
        hidden_TD = to_device(hidden_TD, runner.device).to(runner.dtype)
        positions_T = integers(positions, runner.device)
        num_blocks = num_token_blocks = 0
        for span, members in passes:
            if len(members) == len(chunks):
                hidden_TD = runner.forward(chunks, hidden_TD, positions_T, span)
                num_tokens = len(positions)
            else:
                part = [chunks[index] for index in members]
                rows = integers(token_rows(chunks, members), runner.device)
                num_tokens = len(rows)
                # With more than one chunk `hidden_TD` is a copy, so nobody's input is written.
                hidden_TD[rows] = runner.forward(part, hidden_TD[rows], positions_T[rows], span)
            num_blocks += len(span)
            num_token_blocks += num_tokens * len(span)
        output_TD = to_host(hidden_TD)
        elapsed_s = self._clock.monotonic() - started_s
        self._last_pass = PassTime(num_token_blocks / num_blocks, num_blocks, elapsed_s)
        self.speed.record(*self._last_pass)
        return output_TD

    def _isolate(self, chunks: Sequence[ScheduledChunk], cause: Exception) -> None:
        """Run a failed batch again session by session, and drop the sessions that fail alone."""
        session_ids = list(dict.fromkeys(chunk.session_id for chunk in chunks))
        if len(session_ids) == 1:
            self._drop(session_ids[0], cause)
            return
        for session_id in session_ids:
            try:
                self._forward([chunk for chunk in chunks if chunk.session_id == session_id])
            except Exception as error:  # noqa: BLE001 - as in _tick
                self._drop(session_id, error)

    def _drop(self, session_id: bytes, cause: Exception) -> None:
        """Fail all steps of a session whose pass failed."""
        logger.error("a session's pass failed (%s)", type(cause).__name__, exc_info=cause)
        self._end(session_id, RemoteError("the server failed to run the step; open a new session"))

    def _drop_busy_sessions(self) -> None:
        for session_id in {job.item.session_id for job in self._jobs.values()}:
            self._end(session_id, RemoteError("the server failed; open a new session"))

    def _end(self, session_id: bytes, error: PlanetServeError) -> None:
        """Fail all steps of a session; the loop's side of it stays until it is closed there."""
        self._forget_inputs(session_id)
        for item_id in self._scheduler.close(session_id):
            self._results.add(self._jobs.pop(item_id), error)

    def _forget_inputs(self, session_id: bytes) -> None:
        if self._inputs is not None:
            self._inputs.forget(session_id)
            self._finished_s.pop(session_id, None)

    def _keep_house(self, batch: ScheduledBatch) -> None:
        """Note what the batch does to rows and steps; end sessions that wait too long for pages."""
        for item_id in batch.started:
            job = self._jobs[item_id]
            if self._inputs is not None:
                self._inputs.start(job.item.session_id, job.table)
        for item_id, num_done in batch.rewound:
            job = self._jobs[item_id]
            job.outputs = [torch.cat(job.outputs)[:num_done]] if num_done else []
        self._is_stuck = not (batch.chunks or batch.started)
        now_s = self._clock.monotonic()
        self._waiting_since_s = {
            session_id: self._waiting_since_s.get(session_id, now_s)
            for session_id in self._scheduler.waiting
        }
        for session_id, since_s in self._waiting_since_s.items():
            if now_s - since_s >= self._config.max_page_wait_s:
                self._end(session_id, CacheExhausted("others hold the KV cache for too long"))
                self._is_stuck = False

    def _idle_sessions(self) -> Collection[bytes]:
        """Sessions that have had no step for a while, if anybody waits for pages."""
        if not self._scheduler.waiting:
            return ()
        quiet_s = self._clock.monotonic() - _IDLE_S
        busy = {job.item.session_id for job in self._jobs.values()}
        return {
            session_id
            for session_id, finished_s in self._finished_s.items()
            if finished_s <= quiet_s and session_id not in busy
        }

    def _publish(self) -> None:
        """Let the loop know what has finished, with one wake-up per loop."""
        scheduler = self._scheduler
        self._usage = Usage(
            scheduler.num_used_pages,
            scheduler.num_live_tokens,
            scheduler.num_queued_tokens,
            len(scheduler.waiting),
            scheduler.num_preemptions,
            scheduler.num_recomputed_tokens,
            0 if self._inputs is None else self._inputs.num_bytes,
        )
        self._results.hand_over()
