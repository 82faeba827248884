"""Gives a session its chain, replaces lost hops, and finds out which peer is at fault.

It takes the servers that there are (`server_discovery.py`) and what this client knows of them
(`peer_book.py`), has a chain planned (`chain_planner.py`), and opens, mends or moves the ring on
it. It runs on the event loop. Every wait is bounded: it waits `wait_for_blocks_timeout` seconds for
missing blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterable, Mapping, Sequence

import torch

from planetserve.client.planning.chain_changes import BETTER_CHAIN, LEAVING, ChainChanges
from planetserve.client.planning.chain_diagnosis import explain, other_revision
from planetserve.client.planning.chain_planner import ChainPlanner, ModelFacts
from planetserve.client.planning.peer_book import PeerBook, PlanInputs
from planetserve.client.planning.replanner import Replanner, RunningSession
from planetserve.client.planning.server_discovery import ServerDiscovery
from planetserve.client.ring.ring import RingSession
from planetserve.client.ring.ring_spec import Gap, RingSpec
from planetserve.clock import Clock, SystemClock
from planetserve.config import ClientConfig
from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import (
    Blame,
    ConfigError,
    HopTimeout,
    NoChainAvailable,
    PeerReportedError,
    PlanetServeError,
    RemoteProtocolError,
)
from planetserve.history import History
from planetserve.routing.migration import Offer
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.network import Join
from planetserve.tensors import dtype_name, named_dtype
from planetserve.types import Chain, PeerId, ServerInfo
from planetserve.wire.frame import SESSION_BYTES

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_LEAVING_S = 60.0
_MAX_PINGED_BANNED = 8
_PROMPT_RETRIES = 2
"""Number of first retries that do not wait, since servers that fail together are found one by
one."""
_MAX_REQUESTED_BACKOFF = 8.0
"""Maximum wait that a server may request, as a multiple of the client's own back-off."""


class ChainManager:
    """The chains of one client's sessions. Call `start` before use and `close` after it.

    Raises:
        ConfigError: a setting does not fit the model, or names a peer that cannot exist.
    """

    def __init__(
        self,
        config: ClientConfig,
        facts: ModelFacts,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        join: Join = SwarmNode.start,
    ):
        self.config = config
        self.facts = facts
        self.rng = rng or random.SystemRandom()
        """Source of session ids and seeds, which must be hard to guess."""
        self.clock = self._clock = clock or SystemClock()
        _check_peer_ids(config)
        self._planner = ChainPlanner(config, facts)
        self.peers = PeerBook(config.ban_timeout, self._clock)
        """What this client knows of each server."""
        self.view = ServerDiscovery(
            config, facts, self._planner.remote, self.peers, self._clock, self.rng, join
        )
        """The servers that there are."""
        self.changes = ChainChanges(self._clock)
        """Why sessions changed servers lately."""
        self._replanner = Replanner(self._planner, self.peers, self._clock)
        self._warned_dtype = False
        self.last_chain: Chain | None = None
        """The chain opened most recently."""

    async def start(self) -> None:
        """Join the swarm and look up the model's servers once.

        Raises:
            PeerUnreachable: none of the initial peers answers.
            ModelMismatchError: servers of this model exist, and all that show up within
                `wait_for_blocks_timeout` seconds are of another revision.
        """
        await self.view.start()
        deadline_s = self._clock.monotonic() + self.config.wait_for_blocks_timeout
        # Anybody may announce another revision, which says nothing of servers not found yet.
        view = self.view
        while view.strangers and not (view.servers or view.excluded or view.incompatible):
            if self._clock.monotonic() >= deadline_s:
                await self.close()
                remote = self._planner.remote
                raise other_revision([(remote.start, remote.end)], self.view)
            await self._poll_directory()

    async def close(self) -> None:
        """Leave the swarm. Idempotent."""
        await self.view.close()

    async def plan(self, num_rows: int, lease_tokens: int, seed: int | None = None) -> Chain:
        """The chain the optimizer picks for a session of this size; see `ChainPlanner.plan`.

        Raises:
            MissingBlocksError: blocks stay without a server for `wait_for_blocks_timeout` seconds.
            ModelMismatchError: because the swarm serves something else.
            SessionLengthError: no server takes sequences this long.
        """
        deadline_s = self._clock.monotonic() + self.config.wait_for_blocks_timeout
        while True:
            try:
                return self._plan(num_rows, lease_tokens, seed)
            except NoChainAvailable as error:
                failure = error
            if self._clock.monotonic() >= deadline_s:
                raise await explain(failure, self.view, self._planner) from failure
            await self._lift_bans_of_reachable()
            await self._poll_directory()

    async def _poll_directory(self) -> None:
        await asyncio.sleep(_POLL_S)
        with contextlib.suppress(PlanetServeError):
            await self.view.refresh()

    def longest_session(self, num_rows: int, least: int) -> int | None:
        """Tokens per row for which a chain has room now; as `ChainPlanner.longest`."""
        return self._planner.longest(self._plan_inputs().servers, num_rows, least)

    async def open_ring(
        self,
        num_rows: int,
        lease_tokens: int,
        history: History | None = None,
        seed: int | None = None,
    ) -> RingSession:
        """Plan a chain, open a session on it, and begin to fill it with `history`.

        Raises:
            PlanetServeError: as `plan`, or a hop refuses or cannot be reached.
        """
        if history is None or not any(history.lengths):
            await self.view.refresh_if_stale()
        chain = await self.plan(num_rows, lease_tokens, seed)
        servers = self._infos(chain)
        spec = RingSpec(
            session_id=self.rng.randbytes(SESSION_BYTES),
            num_rows=num_rows,
            max_length=lease_tokens,
            hidden_size=self.facts.hidden_size,
            dtype=_wire_dtype(servers.values()),
            connect_timeout_s=self.config.connect_timeout,
            step_timeout_s=self.config.step_timeout,
            stall_timeout_s=self.config.stall_timeout,
            probe_after_s=self.config.probe_after,
            ping_timeout_s=self.config.ping_timeout,
            receipts=self.config.receipts,
        )
        ring = await RingSession.open(self.view.node, chain, servers, spec, history)
        self._log_route(chain)
        return ring

    async def mend_ring(
        self, ring: RingSession, num_rows: int, lease_tokens: int, history: History
    ) -> None:
        """Have the condemned hops of `ring` replaced.

        Raises:
            NoChainAvailable: nobody can take their place now.
            PlanetServeError: as `RingSession.mend`.
        """

        async def plan_gap(gap: Gap) -> tuple[Chain, Mapping[PeerId, ServerInfo]]:
            chain = self._plan(num_rows, lease_tokens, gap=gap)
            return chain, self._infos(chain)

        await ring.mend(plan_gap, history)
        self._log_route(ring.chain)

    async def find_better(self, session: RunningSession) -> Offer | None:
        """Another chain for a session that runs, if a plan would take it now."""
        return await self._replanner.find_better(self.view.servers.values(), session)

    async def move_ring(self, ring: RingSession, chain: Chain, history: History) -> None:
        """Between two steps: put the hops of `chain` in the place of those it does not share.

        Raises:
            NoChainAvailable: one of the hops is not known any more; nothing has changed.
            PlanetServeError: as `RingSession.mend`.
        """
        if any(hop.peer_id not in self.view.servers for hop in chain):
            raise NoChainAvailable("a server of the better chain has gone")
        left = {hop.peer_id for hop in ring.chain} - {hop.peer_id for hop in chain}
        self.changes.add(BETTER_CHAIN, sorted(left), "another chain is faster")
        await ring.move(chain, self._infos(chain), history)
        self._log_route(ring.chain)

    def note_loads(self, chain: Chain, loads_ms: Mapping[PeerId, float], elapsed_ms: float) -> None:
        """What the hops of a step said of their time per block, and how long it took in all."""
        self.peers.record_loads(chain, loads_ms, elapsed_ms)

    def _infos(self, chain: Chain) -> dict[PeerId, ServerInfo]:
        return {hop.peer_id: self.view.servers[hop.peer_id] for hop in chain}

    def _log_route(self, chain: Chain) -> None:
        self.last_chain = chain
        if self.config.show_route:
            logger.info("route: %s", chain)

    def can_avoid(self, peers: Iterable[PeerId], num_rows: int, lease_tokens: int) -> bool:
        """Ban peers that are leaving; returns whether a chain without them exists now."""
        leaving = sorted(peers)
        self.changes.add(LEAVING, leaving, "it has said that it will leave")
        self.peers.ban(leaving, _LEAVING_S)
        return self.has_chain(num_rows, lease_tokens)

    def has_chain(self, num_rows: int, lease_tokens: int) -> bool:
        """Whether a session of this size could be opened now, without banned servers."""
        try:
            self._plan(num_rows, lease_tokens)
        except PlanetServeError:
            return False
        return True

    async def report_failure(
        self, error: PlanetServeError, chain: Chain | None, lost_s: float = 0.0
    ) -> Sequence[PeerId]:
        """Ban the peer at fault; if the error names none, ping the hops to find it.

        If any hop of the chain may have caused the failure, all are suspected.

        Args:
            error: the error of the attempt.
            chain: the chain in use, if there was one.
            lost_s: seconds that the attempt took. A ban lasts at least as long, or else a server
                that wastes a minute per attempt could do so most of the time.

        Returns:
            The peers at fault.
        """
        culprits: list[PeerId] = []
        for one in (error, *error.others):
            if one.blame is Blame.LOCAL:
                continue
            if one.edge is not None:
                culprits += self.peers.suspect_edge(one.edge)
            elif one.peer_id is not None:
                culprits.append(one.peer_id)
            elif chain is not None and one.blame in (Blame.REMOTE, Blame.UNKNOWN):
                culprits += await self._suspects(one, [hop.peer_id for hop in chain])
        self.peers.ban(culprits, max(self.config.ban_timeout, lost_s))
        self.changes.failed(error, culprits)
        return culprits

    async def _suspects(self, error: PlanetServeError, peers: list[PeerId]) -> Sequence[PeerId]:
        silent = await self.view.silent(peers) if isinstance(error, HopTimeout) else []
        return silent or self.peers.suspect_chain(peers)

    def retry_delay_s(self, error: PlanetServeError, attempt: int) -> float | None:
        """Seconds to wait before retry number `attempt`; None when there must not be one."""
        if not error.retryable or attempt > self.config.max_retries:
            return None
        if isinstance(error, NoChainAvailable):
            # `plan` has already waited for as long as it may.
            return None
        least_s, most_s = self.config.min_backoff, self.config.max_backoff
        if isinstance(error, PeerReportedError) and error.edge is None:
            # Later than it wishes does no harm, and by its wish alone nobody waits for long.
            own_s = least_s * 2 ** (attempt - 1)
            return min(max(own_s, min(error.retry_after_s, _MAX_REQUESTED_BACKOFF * own_s)), most_s)
        if attempt <= _PROMPT_RETRIES:
            return 0.0
        return min(least_s * 2 ** (attempt - 1 - _PROMPT_RETRIES), most_s)

    def snapshot(self, num_rows: int = 1, lease_tokens: int = 1) -> SwarmSnapshot:
        """The snapshot on which a session of this size is planned: live, permitted servers that are
        not banned, of the client's own dtype if these suffice.

        Its block 0 is the first one that the swarm runs.

        Raises:
            SessionLengthError: no server takes sequences this long.
        """
        chosen = self._planner.candidates(self._plan_inputs(), num_rows, lease_tokens)
        return self._planner.snapshot(chosen, num_rows)

    def _plan_inputs(self) -> PlanInputs:
        return self.peers.plan_inputs(self.view.servers.values())

    def _plan(
        self, num_rows: int, lease_tokens: int, seed: int | None = None, gap: Gap | None = None
    ) -> Chain:
        """As `ChainPlanner.plan`, over what is known now; with a fresh seed if None."""
        inputs = self._plan_inputs()
        seed = self.rng.getrandbits(32) if seed is None else seed
        chain = self._planner.plan(inputs, num_rows, lease_tokens, seed, gap)
        chosen = {hop.peer_id for hop in chain}
        used = [info for info in inputs.servers if info.peer_id in chosen]
        if not self._warned_dtype and not self._planner.all_alike(used):
            self._warned_dtype = True
            logger.warning(
                "no chain of %s servers covers the model; using servers of another dtype or with "
                "quantised weights, so outputs may differ from local %s ones",
                *[dtype_name(self.facts.dtype)] * 2,
            )
        return chain

    async def _lift_bans_of_reachable(self) -> None:
        """End the bans of servers that answer a ping, since no other server is left."""
        known = self.view.servers
        banned = [known[peer_id] for peer_id in self.peers.banned() if peer_id in known]
        chosen = banned[:_MAX_PINGED_BANNED]
        answers = await asyncio.gather(*(self.view.ping(info) for info in chosen))
        self.peers.lift_bans(
            info.peer_id for info, alive in zip(chosen, answers, strict=True) if alive
        )


def _check_peer_ids(config: ClientConfig) -> None:
    """Refuse peer ids that cannot exist: a mistyped one would silently match no server."""
    for name in ("allowed_servers", "blocked_servers", "trusted_servers"):
        for peer_id in getattr(config, name) or ():
            try:
                peer_id_bytes(peer_id)
            except RemoteProtocolError as error:
                raise ConfigError(
                    f"{name}: {peer_id[:80]!r} is no peer id; give what follows /p2p/ in the "
                    "server's address, 12D3KooW..."
                ) from error


def _wire_dtype(servers: Iterable[ServerInfo]) -> torch.dtype:
    """The servers' own dtype, so that nothing wider than they compute in travels."""
    names = {info.dtype for info in servers}
    return named_dtype(names.pop()) if len(names) == 1 else torch.float32
