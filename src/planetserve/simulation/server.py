"""One server: admits sessions, batches their steps, sends results on, announces itself.

As the engine does, a tick takes the oldest step of every session up to the token budget and runs
its blocks once: where spans of sessions overlap, their tokens go through the block together. A
block that `n` tokens of a tick go through takes

    decode_ms_per_block + (n - 1) * 1000 / tokens_per_s_per_block

which is linear through the two speeds that a server announces: one token takes
`decode_ms_per_block`, and many tokens run at `tokens_per_s_per_block`. All results are sent at the
end of the tick. Admission, the prompt tokens that a batch may take, the sharing of a full budget,
the waiting for steps that are about to come back and the load that is announced are the real
`KvReservations`, `PrefillBudget`, `TokenBudget`, `BatchDelay` and `StepLatency`. There are no
pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import simpy

from planetserve.config import ServerConfig
from planetserve.routing.server_points import split_load
from planetserve.routing.snapshot import ServerPoint
from planetserve.scheduler.batch_delay import BatchDelay
from planetserve.scheduler.kv_reservations import KvReservations
from planetserve.scheduler.policies import Candidate
from planetserve.scheduler.prefill_budget import PrefillBudget
from planetserve.scheduler.scheduler import SchedulerConfig
from planetserve.scheduler.speed import StepCost, StepLatency
from planetserve.scheduler.token_budget import TokenBudget
from planetserve.simulation.events import SimClock, later
from planetserve.simulation.ring import Ring, Step
from planetserve.simulation.world import Machine
from planetserve.types import BlockSpan

_CONFIG = ServerConfig(model="simulated", num_blocks=1, new_swarm=True)
_SCHEDULER_CONFIG = SchedulerConfig(num_pages=1)
_DECODE_TOKENS = _SCHEDULER_CONFIG.max_decode_tokens
"""Maximum tokens of a step that counts as decoding."""


class _Life:
    """The state that a server loses when it goes down."""

    def __init__(self, cache_tokens: int, decode_ms_per_block: float, clock: SimClock):
        self.kv_reservations = KvReservations(
            cache_tokens // _CONFIG.page_size, _CONFIG.page_size, clock, _CONFIG.max_peer_kv_share
        )
        self.prefill_budget = PrefillBudget(_CONFIG.max_batch_size, _CONFIG.prefill_slowdown)
        self.batch_delay = BatchDelay(_CONFIG.batch_delay_factor)
        self.load = StepLatency(StepCost(0.0, decode_ms_per_block), clock.monotonic())
        self.heads: dict[Ring, Step] = {}
        """The oldest waiting step of each session."""
        self.behind: dict[Ring, deque[Step]] = {}
        """The steps behind it."""
        self.is_busy = False
        self.has_waited = False
        """Whether the tick that runs next, or now, has waited for more steps."""


class _Tick(NamedTuple):
    life: _Life
    batch: list[tuple[Step, int]]
    took_s: float


class SimServer:
    """A machine that serves `span` while it is up.

    Args:
        env: simulated time.
        number: its place among the servers.
        machine: how fast it is.
        span: its blocks.
        cache_tokens: size of its KV cache.
        send: takes a step whose pass is done.
    """

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        machine: Machine,
        span: BlockSpan,
        cache_tokens: int,
        send: Callable[[SimServer, Step], None],
    ):
        self.number = number
        self.machine = machine
        self.span = span
        self.is_up = True
        self.is_draining = False
        self.rings: dict[Ring, None] = {}
        """Sessions that are open here, in the order in which they came."""
        self.busy_s = 0.0
        self.num_ticks = 0
        self.num_tokens = 0
        self._env = env
        self._cache_tokens = cache_tokens
        self._send = send
        self._slope_ms = 1000.0 / machine.tokens_per_s_per_block
        self._token_budget = TokenBudget(_CONFIG.max_batch_size, _SCHEDULER_CONFIG.policy)
        self._life = self._begin_life()

    def _begin_life(self) -> _Life:
        return _Life(self._cache_tokens, self.machine.decode_ms_per_block, SimClock(self._env))

    @property
    def free_tokens(self) -> int:
        """Tokens of the KV cache that no session has been promised."""
        return self._life.kv_reservations.free_tokens

    @property
    def load_ms(self) -> float:
        """Time per block now, as every answer tells the client."""
        return self._life.load.ms_per_block(self._env.now)

    def point(self) -> ServerPoint:
        """The record that it would announce now."""
        machine, span = self.machine, self.span
        alone_ms = machine.decode_ms_per_block
        decode_ms, wait_ms = split_load(self.load_ms, alone_ms, len(span))
        return ServerPoint(
            id=machine.id,
            start=span.start,
            end=span.end,
            decode_ms_per_block=decode_ms,
            tokens_per_s_per_block=machine.tokens_per_s_per_block,
            network_bytes_per_s=machine.network_bytes_per_s,
            free_cache_tokens=self.free_tokens,
            wait_ms=wait_ms,
        )

    def stop(self) -> None:
        """Stop, and drop all sessions and waiting steps."""
        self.is_up = self.is_draining = False
        self.rings.clear()
        self._life = self._begin_life()

    def start(self, span: BlockSpan) -> None:
        """Serve `span` with an empty cache."""
        self.span = span
        self.is_up = True

    def open(self, ring: Ring, lease_tokens: int, span: BlockSpan) -> None:
        """Admit a session whose steps pass `span`.

        Raises:
            CacheExhausted: no room for it.
        """
        self._life.kv_reservations.open(ring.id, ring.client_name, 1, lease_tokens)
        self._life.batch_delay.open(ring.id, span)
        self.rings[ring] = None

    def close(self, ring: Ring) -> None:
        """Forget a session and its waiting steps."""
        if ring in self.rings:
            del self.rings[ring]
            self._life.kv_reservations.close(ring.id)
            self._life.prefill_budget.forget(ring.id)
            self._life.batch_delay.forget(ring.id)
            self.drop_steps(ring)

    def drop_steps(self, ring: Ring) -> None:
        """Drop the waiting steps of a session that has changed its chain."""
        self._life.heads.pop(ring, None)
        self._life.behind.pop(ring, None)

    def arrive(self, step: Step) -> None:
        """A step has arrived; it is dropped if its session no longer needs it."""
        ring = step.ring
        if ring not in self.rings or step.epoch != ring.epoch:
            return
        step.arrived_s = self._env.now
        step.num_left = step.num_tokens
        self._life.batch_delay.returned(ring.id, self._env.now)
        step.is_alone = not self._life.is_busy and not self._life.heads
        if ring in self._life.heads:
            self._life.behind.setdefault(ring, deque()).append(step)
        else:
            self._life.heads[ring] = step
        if not self._life.is_busy:
            self._tick()

    def _tick(self) -> None:
        wait_s = self._delay_s()
        if wait_s:
            self._life.has_waited = True
            later(self._env, wait_s, self._waited, self._life)
            return
        batch = self._batch()
        if not batch:
            return
        parts = [(*step.ring.spans[step.hop], count) for step, count in batch]
        blocks, token_blocks = passed(parts)
        more_ms = self._slope_ms
        first_ms = self.machine.decode_ms_per_block
        took_s = (blocks * (first_ms - more_ms) + token_blocks * more_ms) / 1000.0
        if all(step.num_tokens <= _DECODE_TOKENS for step, _ in batch):
            self._life.batch_delay.record(token_blocks / blocks, blocks, took_s)
        self._life.is_busy = True
        self.busy_s += took_s
        self.num_ticks += 1
        self.num_tokens += sum(count for _, count in batch)
        later(self._env, took_s, self._done, _Tick(self._life, batch, took_s))

    def _delay_s(self) -> float:
        """Seconds for which the next tick waits for more decode steps."""
        heads = self._life.heads
        if not heads or any(step.num_tokens > _DECODE_TOKENS for step in heads.values()):
            return 0.0
        return self._life.batch_delay.wait_s({ring.id for ring in heads}, self._env.now)

    def _waited(self, life: _Life) -> None:
        if life is self._life and not self._life.is_busy:
            self._tick()

    def _done(self, tick: _Tick) -> None:
        if tick.life is not self._life:
            return  # the server was gone meanwhile
        self._life.is_busy = False
        now_s = self._env.now
        has_waited, self._life.has_waited = self._life.has_waited, False
        decoding = [step.ring.id for step, _ in tick.batch if step.num_tokens <= _DECODE_TOKENS]
        prefill = sum(count for step, count in tick.batch if step.num_tokens > _DECODE_TOKENS)
        total = sum(count for _, count in tick.batch)
        self._life.prefill_budget.record(decoding, total - prefill, prefill, tick.took_s, now_s)
        answered = []
        for step, count in tick.batch:
            ring = step.ring
            if self._life.heads.get(ring) is not step:
                continue  # the session was closed meanwhile
            step.num_left -= count
            if step.num_left:
                continue
            behind = self._life.behind.get(ring)
            del self._life.heads[ring]
            if behind:
                self._life.heads[ring] = behind.popleft()
            if step.num_tokens == 1:
                start, end = ring.spans[step.hop]
                alone = step.is_alone and len(tick.batch) == 1 and not has_waited
                elapsed_ms = 1000.0 * (now_s - step.arrived_s)
                self._life.load.add(elapsed_ms, end - start, alone=alone, now_s=now_s)
            if step.num_tokens <= _DECODE_TOKENS:
                answered.append(ring.id)
            self._send(self, step)
        self._life.batch_delay.answered(answered, now_s, self._slope_ms / 1000.0)
        if self._life.heads and not self._life.is_busy:
            self._tick()

    def _batch(self) -> list[tuple[Step, int]]:
        """Steps of the next tick and how many tokens of each: as `Scheduler` grants them."""
        decode: list[Candidate] = []
        prefill: list[Candidate] = []
        by_id: dict[bytes, Step] = {}
        for place, step in enumerate(self._life.heads.values()):
            by_id[step.ring.id] = step
            candidate = Candidate(step.ring.id, place, step.num_left, 1)
            (decode if step.num_tokens <= _DECODE_TOKENS else prefill).append(candidate)
        allowed = None
        if prefill:
            prefilling = {candidate.session_id for candidate in prefill}
            num_decode = sum(candidate.num_tokens for candidate in decode)
            allowed = self._life.prefill_budget.tokens(self._env.now, prefilling, num_decode)
        grants = self._token_budget.share(decode, prefill, allowed)
        return [(by_id[grant.session_id], grant.num_tokens) for grant in grants]


def passed(parts: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Number of blocks that one tick passes, and the sum over them of the tokens through each.

    Args:
        parts: `(start, end, tokens)` of every step in it.
    """
    change: dict[int, int] = {}
    for start, end, tokens in parts:
        change[start] = change.get(start, 0) + tokens
        change[end] = change.get(end, 0) - tokens
    blocks, token_blocks, tokens, since = 0, 0, 0, 0
    for edge in sorted(change):
        if tokens:
            blocks += edge - since
            token_blocks += (edge - since) * tokens
        tokens += change[edge]
        since = edge
    return blocks, token_blocks
