"""One request: it finds a chain, fills its cache, decodes until the end, and moves when it should.

Follows the real client: all hops are opened at once and each leases cache or refuses; the prompt is
sent in pipelined chunks, then one token at a time. When a server is lost or leaves, others take
over its part and are filled by the hop before them, and the rest stays. The same happens when there
is a clearly better chain (`routing/migration.py`).
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import simpy

from planetserve.errors import CacheExhausted, NoChainAvailable
from planetserve.routing.cost import latency_ms
from planetserve.routing.migration import MigrationPolicy, Offer, move_ms, new_hops
from planetserve.simulation.client import CLIENT_CONFIG, SimClient
from planetserve.simulation.events import SimClock, later
from planetserve.simulation.ring import Ring, Step, spliced
from planetserve.simulation.server import SimServer
from planetserve.simulation.world import Request, World
from planetserve.types import BlockSpan, Chain, Hop

_POLL_S = 1.0
"""Seconds between two attempts to find a chain when there is none."""
_CHUNK_TOKENS = 512
"""Tokens of a prompt that one frame carries."""
_LOOKUP_S = 0.5
"""Seconds of a directory look-up: some round trips to any peers."""


class Outcome(enum.Enum):
    """How a request ended."""

    DONE = "done"
    NO_CHAIN = "no chain"


@dataclass(slots=True)
class Record:
    """What a request experienced."""

    request: Request
    first_token_s: float = 0.0
    """Time from its arrival."""
    gaps_ms: list[float] = field(default_factory=list)
    """Times from each token to the next."""
    outcome: Outcome | None = None
    ended_s: float = 0.0
    num_plans: int = 0
    num_refusals: int = 0
    """Number of hops that had no room."""
    num_jumps: int = 0
    """Number of servers that were lost or left."""
    num_moves: int = 0
    """Number of moves to a better chain."""
    num_replayed: int = 0
    """Tokens computed again by a server that took over, summed over servers."""

    @property
    def normalised_ms(self) -> float:
        """Time from the arrival to the end of a served request, per output token."""
        lasted_s = self.ended_s - self.request.arrival_s
        return 1000.0 * lasted_s / self.request.output_tokens


class Surroundings(Protocol):
    """What a session needs of the simulation that it runs in."""

    env: simpy.Environment
    world: World
    number_of: dict[str, int]
    """Server ids to their numbers."""
    servers: list[SimServer]

    def send_into(self, client: SimClient, step: Step) -> None:
        """To hop `step.hop`, from the one before it or from the client."""
        ...

    def count_token(self, now_s: float) -> None:
        """A user got a token."""
        ...

    def ended(self, record: Record) -> None:
        """A request is over."""
        ...


class Session:
    """Serves one request; the simulation gets `record` when it has ended.

    Args:
        sim: where.
        client: whose.
        request: what.
        number: unique.
        moves: whether it looks for better chains while it runs.
    """

    def __init__(
        self, sim: Surroundings, client: SimClient, request: Request, number: int, moves: bool
    ):
        self.record = Record(request)
        self.client = client
        self._sim = sim
        self._env = sim.env
        self._ring = Ring(
            self, b"%d" % number, client.name, client.node, sim.world.links, sim.number_of
        )
        self._generated = 0
        self._latest_token_s = 0.0
        self._searching_since_s: float | None = None
        self._leaving: set[int] = set()
        self._lease = request.prompt_tokens + sim.world.scenario.workload.max_output_tokens
        self._seed = client.draw_seed()
        self._migration_policy: MigrationPolicy | None = None
        if moves:
            dice = random.Random(self._seed)
            self._migration_policy = MigrationPolicy(CLIENT_CONFIG, SimClock(sim.env), dice)

    @property
    def _known(self) -> int:
        """Tokens of the text so far."""
        return self.record.request.prompt_tokens + self._generated

    def begin(self) -> None:
        """Look for a chain and start with an empty cache."""
        if self._searching_since_s is None:
            self._searching_since_s = self._env.now
        self._abandon()
        if self.client.refresh(self._env.now):
            self._later(_LOOKUP_S, self._plan)
        else:
            self._plan()

    def _later(self, delay_s: float, do: Callable[[], None]) -> None:
        """Call `do` after `delay_s`, unless the session has gone on otherwise by then."""

        def act(epoch: int) -> None:
            if epoch == self._ring.epoch:
                do()

        later(self._env, delay_s, act, self._ring.epoch)

    def _plan(self) -> None:
        try:
            snapshot = self.client.snapshot(self._env.now)
            self.record.num_plans += 1
            chain = self.client.plan(snapshot, self._lease, self._seed)
        except NoChainAvailable:
            self._later(_POLL_S, self._begin_or_give_up)
            return
        self._open(chain.hops, chain)

    def _begin_or_give_up(self) -> None:
        since_s = self._env.now if self._searching_since_s is None else self._searching_since_s
        if self._env.now - since_s < self._sim.world.scenario.workload.patience_s:
            self.begin()
        else:
            self._abandon()
            self._end(Outcome.NO_CHAIN)

    def _open(self, hops: Sequence[Hop], chain: Chain, is_move: bool = False) -> None:
        """Open `hops`, all at once, and then run on `chain`, of which they are a part."""
        half_ms = self._sim.world.links.half_ms
        numbers = [self._sim.number_of[hop.peer_id] for hop in hops]
        farthest_ms = max(half_ms(self.client.node, number) for number in numbers)
        attempt = _Attempt(tuple(hops), chain, is_move)
        self._later(2 * farthest_ms / 1000.0, partial(self._answered, attempt))

    def _answered(self, attempt: _Attempt) -> None:
        """All hops have answered, or one never will."""
        now_s = self._env.now
        opened: list[int] = []
        for hop in attempt.hops:
            number = self._sim.number_of[hop.peer_id]
            server = self._sim.servers[number]
            ban_s, wait_s = 0.0, 0.0
            if not server.is_up:
                ban_s, wait_s = CLIENT_CONFIG.ban_timeout, CLIENT_CONFIG.connect_timeout
            elif server.is_draining or not server.span.covers(hop.span):
                ban_s = CLIENT_CONFIG.ban_timeout  # it answers, but has not the announced room
            elif self._ring not in server.rings:
                try:
                    server.open(self._ring, self._lease, hop.span)
                    opened.append(number)
                except CacheExhausted as error:
                    self.record.num_refusals += 1
                    ban_s = wait_s = error.retry_after_s
            if ban_s:
                self.client.ban(number, now_s + ban_s)
                for other in opened:
                    self._sim.servers[other].close(self._ring)
                self._later(wait_s, self._stay if attempt.is_move else self._begin_or_give_up)
                return
        self._run_on(attempt)

    def _stay(self) -> None:
        self._send(1, first=0, stop=None)

    def _run_on(self, attempt: _Attempt) -> None:
        """Put the opened hops in place and fill their caches."""
        ring, old = self._ring, self._ring.servers
        ring.set_chain(attempt.chain)
        for number in old:
            if number not in ring.servers:
                self._sim.servers[number].close(ring)
        for number in ring.servers:
            self._sim.servers[number].drop_steps(ring)
        self.client.rings[ring] = None
        self._searching_since_s = None
        self._leaving &= set(ring.servers)
        known = self._known
        if len(attempt.hops) == len(attempt.chain):
            # All hops are new: the result of the whole text is the next token.
            if self._generated:
                self.record.num_replayed += known * len(attempt.hops)
            self._send(known, first=0, stop=None)
        else:
            self.record.num_replayed += (known - 1) * len(attempt.hops)
            first = attempt.chain.hops.index(attempt.hops[0])
            self._send(known - 1, first, first + len(attempt.hops))

    def _send(self, num_tokens: int, first: int, stop: int | None) -> None:
        """Send tokens in chunks into hop `first`, from the hop before it."""
        while num_tokens > 0:
            count = min(_CHUNK_TOKENS, num_tokens)
            num_tokens -= count
            ring = self._ring
            step = Step(ring, ring.epoch, count, is_last=num_tokens == 0, hop=first, stop=stop)
            self._sim.send_into(self.client, step)

    def result(self, step: Step) -> None:
        """A step has passed all hops, or has filled the hops that it had to fill."""
        if step.epoch != self._ring.epoch or not step.is_last:
            return
        if step.stop is not None:
            self._send(1, first=0, stop=None)
            return
        now_s = self._env.now
        if self._generated == 0:
            self.record.first_token_s = now_s - self.record.request.arrival_s
        else:
            gap_ms = 1000.0 * (now_s - self._latest_token_s)
            self.record.gaps_ms.append(gap_ms)
            if self._migration_policy is not None:
                self._migration_policy.count_step(self._ring.chain, gap_ms)
        self._latest_token_s = now_s
        self._generated += 1
        self._sim.count_token(now_s)
        if self._generated == self.record.request.output_tokens:
            self._abandon()
            self._end(Outcome.DONE)
        elif not self._change_chain():
            self._send(1, first=0, stop=None)

    def server_leaves(self, server: int) -> None:
        """A server has announced that it leaves; others take its part between two tokens."""
        self._leaving.add(server)

    def lost(self, server: int) -> None:
        """A server has been found silent."""
        if server not in self._ring.servers:
            return
        self.client.ban(server, self._env.now + CLIENT_CONFIG.ban_timeout)
        self.record.num_jumps += 1
        self._replace({server})

    def _change_chain(self) -> bool:
        """Between two tokens: begin to replace a server that leaves, or to move to a better
        chain."""
        if self._leaving:
            self.record.num_jumps += 1
            self._replace(set(self._leaving))
            return True
        if self._migration_policy is None or not self._migration_policy.is_due():
            return False
        # The length of a text is not known; the estimate is that as many tokens follow as there are
        # already.
        tokens_left = min(self._generated, self._lease - self._known)
        chain = self._migration_policy.decide(
            self._better_chain(self._migration_policy.may_decide), tokens_left
        )
        if chain is None:
            return False
        self.record.num_moves += 1
        first, last = new_hops(self._ring.chain.hops, chain.hops)
        self._splice(chain.hops[first : len(chain) - last], chain, is_move=True)
        return True

    def _better_chain(self, refresh: bool) -> Offer | None:
        now_s = self._env.now
        if refresh:
            self.client.refresh(now_s)
        snapshot = self.client.snapshot(now_s, own=self._ring, lease=self._lease)
        old = self._ring.chain
        if not all(hop.peer_id in snapshot.index for hop in old):
            return None
        try:
            self.record.num_plans += 1
            chain = self.client.plan(snapshot, self._lease, self._seed)
        except NoChainAvailable:
            return None
        if chain.hops == old.hops:
            return None
        first, last = new_hops(old.hops, chain.hops)
        entering = chain.hops[first : len(chain) - last]
        took_ms = move_ms(snapshot, entering, self._known, num_rows=1) if entering else 0.0
        return Offer(chain, latency_ms(snapshot, old), chain.latency_ms, took_ms)

    def _replace(self, servers: set[int]) -> None:
        """Have other servers run the blocks of `servers`; if there are none, start again."""
        ring = self._ring
        bad = [place for place, number in enumerate(ring.servers) if number in servers]
        if not bad or not self._generated:
            self._leaving.clear()
            self.begin()
            return
        first, stop = bad[0], bad[-1] + 1
        hops = ring.chain.hops
        span = BlockSpan(hops[first].start, hops[stop - 1].end)
        before = ring.servers[first - 1] if first else None
        after = ring.servers[stop] if stop < len(hops) else None
        stay = {*ring.servers[:first], *ring.servers[stop:]}
        try:
            self.record.num_plans += 1
            gap = self.client.plan_gap(
                self._env.now, span, (before, after), stay | servers, self._lease, self._seed
            )
        except NoChainAvailable:
            self._leaving.clear()
            self.begin()
            return
        self._splice(gap.hops, spliced(hops, first, stop, gap.hops))

    def _splice(self, entering: Sequence[Hop], chain: Chain, is_move: bool = False) -> None:
        # Results that still come from the old chain are ignored.
        self._ring.epoch += 1
        if entering:
            self._open(entering, chain, is_move)
        else:
            self._ring.set_chain(chain)
            self._send(1, first=0, stop=None)

    def _abandon(self) -> None:
        ring = self._ring
        ring.epoch += 1
        self.client.rings.pop(ring, None)
        for number in ring.servers:
            self._sim.servers[number].close(ring)
        ring.set_chain(Chain(()))

    def _end(self, outcome: Outcome) -> None:
        self.record.outcome = outcome
        self.record.ended_s = self._env.now
        self._sim.ended(self.record)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Hops that are being opened, and the resulting chain."""

    hops: tuple[Hop, ...]
    chain: Chain
    is_move: bool
    """Whether the old chain still works."""
