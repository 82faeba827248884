"""One server: admits sessions, batches their steps, sends results on, announces itself.

As the engine does, a tick takes the oldest step of every session up to the token budget and runs
its blocks once: where spans of sessions overlap, their tokens go through the block together. A
block that `n` tokens of a tick go through takes

    decode_ms_per_block + (n - 1) * 1000 / tokens_per_s_per_block

the line through the two speeds that a server announces: one token takes `decode_ms_per_block`, and
many of them come at `tokens_per_s_per_block`. All results go at the end of the tick. Admission, the
prompt tokens that a batch may take, the sharing of a full budget, the waiting for steps that are
about to come back and the load that is announced are the real `KvReservations`, `PrefillBudget`,
scheduling policy, `BatchDelay` and `StepLatency`; how a batch is put together repeats
`Scheduler`, without pages.
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
from planetserve.scheduler.policies import POLICIES, Candidate, SchedulingPolicy
from planetserve.scheduler.prefill_budget import PrefillBudget
from planetserve.scheduler.speed import StepCost, StepLatency
from planetserve.simulation.events import SimClock, later
from planetserve.simulation.ring import Ring, Step
from planetserve.simulation.world import Machine
from planetserve.types import BlockSpan

_CONFIG = ServerConfig(model="simulated", num_blocks=1, new_swarm=True)
_DECODE_TOKENS = 16
"""A step of at most this many tokens counts as decoding; `SchedulerConfig.max_decode_tokens`."""
_PREFILL_SHARE = 8
"""Decoding leaves waiting prefill one part in this many of a full budget, as in `Scheduler`."""


class _Tick(NamedTuple):
    life: object
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
        self._clock = SimClock(env)
        self._slope_ms = 1000.0 / machine.tokens_per_s_per_block
        self._policies: tuple[SchedulingPolicy, SchedulingPolicy] | None = None
        self._reset()

    def _reset(self) -> None:
        pages = self._cache_tokens // _CONFIG.page_size
        self.leases = KvReservations(
            pages, _CONFIG.page_size, self._clock, _CONFIG.max_peer_kv_share
        )
        self._prefill_budget = PrefillBudget(_CONFIG.max_batch_size, _CONFIG.prefill_slowdown)
        self._batch_delay = BatchDelay(_CONFIG.batch_patience)
        self._has_waited = False
        self._load = StepLatency(StepCost(0.0, self.machine.decode_ms_per_block), self._env.now)
        self._heads: dict[Ring, Step] = {}
        self._behind: dict[Ring, deque[Step]] = {}
        self._is_busy = False
        self._life = object()

    @property
    def load_ms(self) -> float:
        """Time per block now, as every answer tells the client."""
        return self._load.ms_per_block(self._env.now)

    def point(self) -> ServerPoint:
        """What it would announce now."""
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
            free_cache_tokens=self.leases.free_tokens,
            wait_ms=wait_ms,
        )

    def stop(self) -> None:
        """Be gone, with everything that was open or waiting here."""
        self.is_up = self.is_draining = False
        self.rings.clear()
        self._reset()

    def start(self, span: BlockSpan) -> None:
        """Serve `span` with an empty cache."""
        self.span = span
        self.is_up = True

    def open(self, ring: Ring, lease_tokens: int, span: BlockSpan) -> None:
        """Admit a session whose steps pass `span`.

        Raises:
            CacheExhausted: no room for it.
        """
        self.leases.open(ring.id, ring.session.client.name, 1, lease_tokens)
        self._batch_delay.open(ring.id, span)
        self.rings[ring] = None

    def close(self, ring: Ring) -> None:
        """Forget a session and its waiting steps."""
        if ring in self.rings:
            del self.rings[ring]
            self.leases.close(ring.id)
            self._prefill_budget.forget(ring.id)
            self._batch_delay.forget(ring.id)
            self.drop_steps(ring)

    def drop_steps(self, ring: Ring) -> None:
        """Forget what waits here of a session that goes on otherwise."""
        self._heads.pop(ring, None)
        self._behind.pop(ring, None)

    def arrive(self, step: Step) -> None:
        """A step has come in; one that nobody waits for any more is dropped."""
        ring = step.ring
        if ring not in self.rings or step.epoch != ring.epoch:
            return
        step.arrived_s = self._env.now
        step.num_left = step.num_tokens
        self._batch_delay.returned(ring.id, self._env.now)
        step.is_alone = not self._is_busy and not self._heads
        if ring in self._heads:
            self._behind.setdefault(ring, deque()).append(step)
        else:
            self._heads[ring] = step
        if not self._is_busy:
            self._tick()

    def _tick(self) -> None:
        wait_s = self._wait_for_company()
        if wait_s:
            self._has_waited = True
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
            self._batch_delay.record(token_blocks / blocks, blocks, took_s)
        self._is_busy = True
        self.busy_s += took_s
        self.num_ticks += 1
        self.num_tokens += sum(count for _, count in batch)
        later(self._env, took_s, self._done, _Tick(self._life, batch, took_s))

    def _wait_for_company(self) -> float:
        """Seconds for which the next tick waits for more decode steps."""
        heads = self._heads
        if not heads or any(step.num_tokens > _DECODE_TOKENS for step in heads.values()):
            return 0.0
        return self._batch_delay.wait_s({ring.id for ring in heads}, self._env.now)

    def _waited(self, life: object) -> None:
        if life is self._life and not self._is_busy:
            self._tick()

    def _done(self, tick: _Tick) -> None:
        if tick.life is not self._life:
            return  # the server was gone meanwhile
        self._is_busy = False
        now_s = self._env.now
        has_waited, self._has_waited = self._has_waited, False
        decoding = [step.ring.id for step, _ in tick.batch if step.num_tokens <= _DECODE_TOKENS]
        prefill = sum(count for step, count in tick.batch if step.num_tokens > _DECODE_TOKENS)
        total = sum(count for _, count in tick.batch)
        self._prefill_budget.record(decoding, total - prefill, prefill, tick.took_s, now_s)
        answered = []
        for step, count in tick.batch:
            ring = step.ring
            if self._heads.get(ring) is not step:
                continue  # the session was closed meanwhile
            step.num_left -= count
            if step.num_left:
                continue
            behind = self._behind.get(ring)
            del self._heads[ring]
            if behind:
                self._heads[ring] = behind.popleft()
            if step.num_tokens == 1:
                start, end = ring.spans[step.hop]
                alone = step.is_alone and len(tick.batch) == 1 and not has_waited
                elapsed_ms = 1000.0 * (now_s - step.arrived_s)
                self._load.add(elapsed_ms, end - start, alone=alone, now_s=now_s)
            if step.num_tokens <= _DECODE_TOKENS:
                answered.append(ring.id)
            self._send(self, step)
        self._batch_delay.answered(answered, now_s, self._slope_ms / 1000.0)
        if self._heads and not self._is_busy:
            self._tick()

    def _batch(self) -> list[tuple[Step, int]]:
        """Steps of the next tick and how many tokens of each: what `Scheduler` would grant."""
        heads = self._heads.values()
        decode = [step for step in heads if step.num_tokens <= _DECODE_TOKENS]
        budget = _CONFIG.max_batch_size
        if len(decode) == len(heads):
            return self._share(0, decode, budget)
        prefill = [step for step in heads if step.num_tokens > _DECODE_TOKENS]
        reserved = budget // _PREFILL_SHARE if decode else 0
        batch = self._share(0, decode, budget - reserved)
        budget -= sum(count for _, count in batch)
        prefilling = {step.ring.id for step in prefill}
        num_decode = sum(step.num_left for step in decode)
        allowed = self._prefill_budget.tokens(self._env.now, prefilling, num_decode)
        budget = min(budget, max(0 if decode else 1, allowed))
        return batch + self._share(1, prefill, budget) if budget > 0 else batch

    def _share(self, which: int, steps: list[Step], budget: int) -> list[tuple[Step, int]]:
        """What of `steps` fits `budget`; the policy decides only if not all of it does."""
        if sum(step.num_left for step in steps) <= budget:
            return [(step, step.num_left) for step in steps]
        if self._policies is None:
            name = "deficit_round_robin"
            self._policies = (POLICIES.create(name), POLICIES.create(name))
        by_id = {step.ring.id: step for step in steps}
        candidates = [
            Candidate(step.ring.id, place, step.num_left, 1) for place, step in enumerate(steps)
        ]
        grants = self._policies[which].share(candidates, budget)
        return [(by_id[grant.session_id], grant.num_tokens) for grant in grants]


def passed(parts: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Blocks that one tick passes, and the tokens through each of them, added up.

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
