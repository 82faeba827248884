"""Searches for a better chain while a session runs on another one, without delaying its steps.

Plans run in a thread, for at most a twentieth of the time over all sessions of a client: a client
with a thousand sessions, or in a swarm of ten thousand servers, searches less often.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from planetserve.client.planning.chain_planner import ChainPlanner
from planetserve.client.planning.peer_book import PeerBook, PlanInputs
from planetserve.clock import Clock
from planetserve.errors import NoChainAvailable, SessionLengthError
from planetserve.routing.migration import Offer
from planetserve.types import Chain, ServerInfo

_IDLE_FACTOR = 20.0
"""Multiple of the time of a search for which no other one starts after it."""


@dataclass(frozen=True, slots=True)
class RunningSession:
    """What a search has to know of a session."""

    chain: Chain
    num_rows: int
    lease_tokens: int
    position: int
    """Tokens in its longest row."""
    measured_ms: float
    """Measured time per token, in ms."""
    seed: int


class Replanner:
    """Compares chains in use with the chains that a plan would give now."""

    def __init__(self, planner: ChainPlanner, peers: PeerBook, clock: Clock):
        self._planner = planner
        self._peers = peers
        self._clock = clock
        self._idle_until_s = 0.0

    async def find_better(
        self, servers: Iterable[ServerInfo], session: RunningSession
    ) -> Offer | None:
        """The chain that the session would get now; None if that is its own, or it is too early.

        Args:
            servers: the announced records of those that the settings permit.
            session: the session that runs now.
        """
        started_s = self._clock.monotonic()
        if started_s < self._idle_until_s:
            return None
        self._idle_until_s = float("inf")
        try:
            announced = tuple(servers)
            inputs = self._peers.plan_inputs(announced, with_penalties=False)
            predicted_ms = await asyncio.to_thread(
                self._planner.latency_ms, inputs, session.num_rows, session.chain
            )
            if predicted_ms is None:
                return None  # a hop is no longer announced, or banned
            if not inputs.is_suspect(session.chain):
                self._peers.record_latency(session.chain, predicted_ms, session.measured_ms)
            inputs = _for_session(session, self._peers.plan_inputs(announced))
            return await asyncio.to_thread(_compare, self._planner, inputs, session)
        finally:
            now_s = self._clock.monotonic()
            self._idle_until_s = now_s + _IDLE_FACTOR * (now_s - started_s)


def _compare(planner: ChainPlanner, inputs: PlanInputs, session: RunningSession) -> Offer | None:
    """Runs in a thread, on frozen values."""
    try:
        chain = planner.plan(inputs, session.num_rows, session.lease_tokens, session.seed)
    except (NoChainAvailable, SessionLengthError):
        return None
    if chain.hops == session.chain.hops:
        return None
    now_ms = planner.latency_ms(inputs, session.num_rows, session.chain)
    if now_ms is None:
        return None
    move_ms = planner.move_ms(inputs, session.num_rows, session.position, session.chain, chain)
    return Offer(chain, now_ms, chain.latency_ms, move_ms)


def _for_session(session: RunningSession, inputs: PlanInputs) -> PlanInputs:
    """The inputs with the servers that compute in the data type of the session's chain, which must
    not change on the way. What the session itself has leased counts as free."""
    used = {hop.peer_id for hop in session.chain}
    dtypes = {info.dtype for info in inputs.servers if info.peer_id in used}
    own_tokens = session.num_rows * session.lease_tokens
    return inputs.only(
        dataclasses.replace(info, free_cache_tokens=info.free_cache_tokens + own_tokens)
        if info.peer_id in used
        else info
        for info in inputs.servers
        if info.dtype in dtypes
    )
