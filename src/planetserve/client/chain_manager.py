"""Which servers exist, which of them to use, and which to leave alone for a while.

Owns the client's swarm node, its directory view, measured round-trip times and bans; has a chain
planned over the servers that are left (`planning.py`), and opens it. Runs on the portal's loop.
Every wait is bounded: missing blocks are waited for `wait_for_blocks_timeout` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterable, Mapping, Sequence

import torch

from planetserve.client.experience import Experience
from planetserve.client.planning import ChainPlanner, ModelFacts, spans_text
from planetserve.client.ring import RingSession
from planetserve.client.ring_spec import Gap, RingSpec
from planetserve.client.scout import Running, Scout
from planetserve.clock import Clock, SystemClock
from planetserve.config import ClientConfig
from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import (
    Blame,
    CapacityError,
    ConfigError,
    EdgeStalled,
    HopTimeout,
    MissingBlocksError,
    ModelMismatchError,
    NoChainAvailable,
    PlanetServeError,
    RemoteProtocolError,
)
from planetserve.history import History
from planetserve.routing.moving import Offer
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.swarm.averages import PeerAverages
from planetserve.swarm.directory import Directory
from planetserve.swarm.node import NodeConfig, SwarmNode
from planetserve.swarm.ping import ping, whom_to_ping
from planetserve.types import Chain, PeerId, ServerInfo, ServerState

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_LEAVING_S = 60.0
_FRESH_S = 5.0
"""So old may the view of the directory be that a session begins with."""
_LOOK_AGAIN_S = 1.0
"""How long a session that begins waits for a newer one at most."""
_MAX_REVIVED = 8
_KEPT_FRESH = 4
"""Times `max_pinged` servers at either end of the chain are measured again and again."""
_PROMPT_RETRIES = 2
"""Servers that fail together are found one by one: the first retries do not wait."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ChainManager:
    """The client's view of the swarm. `start` before use, `close` after.

    Raises:
        ConfigError: a setting does not fit the model, or names a peer that cannot exist.
    """

    def __init__(self, config: ClientConfig, facts: ModelFacts, clock: Clock | None = None):
        self.config = config
        self.facts = facts
        self._clock = clock or SystemClock()
        _check_peer_ids(config)
        self._prefix = config.dht_prefix or facts.prefix
        self._servers: dict[PeerId, ServerInfo] = {}
        self._strangers: dict[PeerId, ServerInfo] = {}
        self._excluded: list[ServerInfo] = []
        self._banned_until_s: dict[PeerId, float] = {}
        self._avoid_until_s: dict[tuple[PeerId, PeerId], float] = {}
        self._rtt = PeerAverages(max_peers=256, clock=self._clock)
        self._rng = random.Random()
        self._planner = ChainPlanner(config, facts, self._rtt)
        self._experience = Experience(max_peers=256, clock=self._clock)
        self._scout = Scout(self._planner, self._experience, self._clock)
        self._node: SwarmNode | None = None
        self._directory: Directory | None = None
        self._refresher: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._looked_up_s = float("-inf")
        self.last_chain: Chain | None = None
        """The chain opened most recently."""

    @property
    def node(self) -> SwarmNode:
        """The running swarm node."""
        if self._node is None:
            raise NoChainAvailable("the client has not joined a swarm")
        return self._node

    async def start(self) -> None:
        """Join the swarm and look up the model's servers once.

        Raises:
            PeerUnreachable: none of the initial peers answers.
            ModelMismatchError: servers of this model exist, all of another revision.
        """
        config = NodeConfig(
            initial_peers=self.config.initial_peers,
            client_mode=True,
            daemon_startup_timeout_s=self.config.daemon_startup_timeout,
            connect_timeout_s=self.config.connect_timeout,
        )
        self._node = await SwarmNode.start(config)
        self._directory = Directory(self._node, self._clock)
        try:
            await self.refresh()
            if self._strangers and not self._servers and not self._excluded:
                raise self._mismatch()
        except BaseException:
            await self.close()
            raise
        self._refresher = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Leave the swarm. Idempotent."""
        refresher, self._refresher = self._refresher, None
        if refresher is not None:
            refresher.cancel()
            await asyncio.gather(refresher, return_exceptions=True)
        node, self._node = self._node, None
        if node is not None:
            await node.close()

    async def refresh(self) -> None:
        """Read the directory anew and ping servers whose round-trip time is not known yet."""
        await self._look_up()
        await self._ping_edges()

    async def _look_again(self) -> None:
        """Before a session begins: read the directory, unless that has just been done.

        What it said a minute ago is of a time before other sessions began: those that plan on it
        all go to servers that were idle then.
        """
        async with self._looking:
            if self._clock.monotonic() - self._looked_up_s < _FRESH_S:
                return
            with contextlib.suppress(PlanetServeError, TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._look_up()

    async def _look_up(self) -> None:
        if self._directory is None:
            return
        found = await self._directory.lookup(self._prefix)
        online = [info for info in found if info.state is ServerState.ONLINE]
        ours = [info for info in online if info.fingerprint == self.facts.fingerprint]
        self._servers = {info.peer_id: info for info in ours if self._permitted(info.peer_id)}
        self._excluded = [info for info in ours if info.peer_id not in self._servers]
        self._strangers = {
            info.peer_id: info for info in online if info.fingerprint != self.facts.fingerprint
        }
        self._looked_up_s = self._clock.monotonic()

    async def plan(self, num_rows: int, lease_tokens: int, seed: int | None = None) -> Chain:
        """The chain the optimizer picks for a session of this size; see `ChainPlanner.plan`.

        Raises:
            MissingBlocksError: blocks stay without a server for `wait_for_blocks_timeout` seconds.
            ModelMismatchError: because the swarm serves something else.
            SessionLengthError: no server takes sequences this long.
        """
        deadline_s = self._clock.monotonic() + self.config.wait_for_blocks_timeout
        while True:
            self._planner.avoided_edges = self._edges_to_avoid()
            try:
                return self._planner.plan(self._usable(), num_rows, lease_tokens, seed)
            except NoChainAvailable as error:
                failure: PlanetServeError = error
            if self._clock.monotonic() >= deadline_s:
                raise await self._explain(failure) from failure
            await self._revive()
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(PlanetServeError):
                await self.refresh()

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
            await self._look_again()
        chain = await self.plan(num_rows, lease_tokens, seed)
        servers = self._infos(chain)
        spec = RingSpec(
            num_rows=num_rows,
            max_length=lease_tokens,
            hidden_size=self.facts.hidden_size,
            dtype=_wire_dtype(servers.values()),
            connect_timeout_s=self.config.connect_timeout,
            step_timeout_s=self.config.step_timeout,
            stall_timeout_s=self.config.stall_timeout,
            probe_after_s=self.config.probe_after,
            ping_timeout_s=self.config.ping_timeout,
        )
        ring = await RingSession.open(self.node, chain, servers, spec, history)
        self._show(chain)
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
            self._planner.avoided_edges = self._edges_to_avoid()
            chain = self._planner.plan(self._usable(), num_rows, lease_tokens, gap=gap)
            return chain, self._infos(chain)

        await ring.mend(plan_gap, history)
        self._show(ring.chain)

    async def find_better(self, session: Running) -> Offer | None:
        """Another chain for a session that runs, if a plan would take it now."""
        self._planner.avoided_edges = self._edges_to_avoid()
        return await self._scout.look(self._present(), session)

    async def move_ring(self, ring: RingSession, chain: Chain, history: History) -> None:
        """Between two steps: put the hops of `chain` in the place of those it does not share.

        Raises:
            NoChainAvailable: one of the hops is not known any more; nothing has changed.
            PlanetServeError: as `RingSession.mend`.
        """
        if any(hop.peer_id not in self._servers for hop in chain):
            raise NoChainAvailable("a server of the better chain has gone")
        await ring.move(chain, self._infos(chain), history)
        self._show(ring.chain)

    def note_loads(self, loads_ms: Mapping[PeerId, float]) -> None:
        """What the hops of a step said of their time per block."""
        self._experience.note_loads(loads_ms)

    def _infos(self, chain: Chain) -> dict[PeerId, ServerInfo]:
        return {hop.peer_id: self._servers[hop.peer_id] for hop in chain}

    def _show(self, chain: Chain) -> None:
        self.last_chain = chain
        if self.config.show_route:
            logger.info("route: %s", chain)

    def _edges_to_avoid(self) -> set[tuple[PeerId, PeerId]]:
        now_s = self._clock.monotonic()
        avoided = {
            edge: until_s for edge, until_s in self._avoid_until_s.items() if until_s > now_s
        }
        self._avoid_until_s = avoided
        return set(avoided)

    def can_avoid(self, peers: Iterable[PeerId], num_rows: int, lease_tokens: int) -> bool:
        """Leave `peers` out of the next plans; say whether a chain without them exists now."""
        until_s = self._clock.monotonic() + _LEAVING_S
        self._banned_until_s.update(dict.fromkeys(peers, until_s))
        try:
            self._planner.plan(self._usable(), num_rows, lease_tokens)
        except PlanetServeError:
            return False
        return True

    def report_success(self, chain: Chain) -> None:
        """A step went through: its servers are fine."""
        for hop in chain:
            self._banned_until_s.pop(hop.peer_id, None)

    async def report_failure(
        self, error: PlanetServeError, chain: Chain | None
    ) -> Sequence[PeerId]:
        """Keep the peer at fault out of the next plans; find it by pinging if nobody named it.

        Returns:
            The peers at fault.
        """
        if error.blame is Blame.LOCAL:
            return ()
        now_s = self._clock.monotonic()
        if isinstance(error, EdgeStalled):
            self._avoid_until_s[error.edge] = now_s + self.config.ban_timeout
            return ()
        culprits: Sequence[PeerId] = [error.peer_id] if error.peer_id else []
        if not culprits and isinstance(error, HopTimeout) and chain is not None:
            culprits = await self._silent([hop.peer_id for hop in chain])
        wait_s = self.config.ban_timeout
        if isinstance(error, CapacityError):
            wait_s = error.retry_after_s
        for peer_id in culprits:
            self._banned_until_s[peer_id] = now_s + wait_s
        return culprits

    def retry_delay_s(self, error: PlanetServeError, attempt: int) -> float | None:
        """Seconds to wait before retry number `attempt`; None when there must not be one."""
        if not error.retryable or attempt > self.config.max_retries:
            return None
        if isinstance(error, NoChainAvailable):
            # `plan` has already waited for as long as it may.
            return None
        if isinstance(error, CapacityError):
            return min(error.retry_after_s, self.config.max_backoff)
        if attempt <= _PROMPT_RETRIES:
            return 0.0
        doubled = 2 ** (attempt - 1 - _PROMPT_RETRIES)
        return min(self.config.min_backoff * doubled, self.config.max_backoff)

    def snapshot(self, num_rows: int = 1, lease_tokens: int = 1) -> SwarmSnapshot:
        """What a session of this size is planned on: live, permitted servers that are not banned,
        of the client's own dtype if these suffice.

        Its block 0 is the first one that the swarm runs.

        Raises:
            SessionLengthError: no server takes sequences this long.
        """
        chosen = self._planner.candidates(self._usable(), num_rows, lease_tokens)
        return self._planner.snapshot(chosen, num_rows)

    def _permitted(self, peer_id: PeerId) -> bool:
        allowed, blocked = self.config.allowed_servers, self.config.blocked_servers
        return (allowed is None or peer_id in allowed) and peer_id not in (blocked or ())

    def _usable(self) -> list[ServerInfo]:
        """Records of servers that may be used now, corrected by what this client knows better."""
        return [self._experience.corrected(info) for info in self._present()]

    def _present(self) -> list[ServerInfo]:
        now_s = self._clock.monotonic()
        return [
            info
            for peer_id, info in self._servers.items()
            if self._banned_until_s.get(peer_id, 0.0) <= now_s
        ]

    async def _explain(self, failure: PlanetServeError) -> PlanetServeError:
        """The error a person can act on, after waiting has not helped."""
        if not isinstance(failure, MissingBlocksError):
            return failure
        filtered = self._filtered(failure)
        if filtered is not None:
            return filtered
        if self._strangers:
            return self._mismatch(failure)
        peers = ", ".join(self.config.initial_peers) or "none given"
        if not self._servers and self._directory is not None:
            others = await self._directory.models()
            others.pop(self._prefix, None)
            if others:
                return ModelMismatchError(
                    f"no server of {self.facts.name} ({self._prefix}) in this swarm, which serves "
                    f"{', '.join(sorted(others))}; load one of these or start servers of yours",
                    failure.missing,
                )
        return MissingBlocksError(
            f"no live server holds {spans_text(failure.missing)} of {self.facts.name} after "
            f"waiting {self.config.wait_for_blocks_timeout:g} s; start one with `python -m "
            f"planetserve.run_server {self.facts.name} --block_indices "
            f"{failure.missing[0][0]}:{failure.missing[0][1]} --initial_peers ...` "
            f"(joined through: {peers})",
            failure.missing,
        )

    def _filtered(self, failure: MissingBlocksError) -> MissingBlocksError | None:
        """The failure in terms of the settings that caused it, if they did."""
        missing = failure.missing
        excluded = [info for info in self._excluded if _holds_some(info, missing)]
        barred = self._planner.barred(missing, self._servers.values())
        reasons = []
        if excluded:
            names = ("allowed_servers", "blocked_servers")
            given = [name for name in names if getattr(self.config, name) is not None]
            reasons.append(f"{' and '.join(given)} ({len(excluded)} of them)")
        if barred:
            reasons.append(f"trusted_servers ({len(barred)} of them)")
        if not reasons:
            return None
        return MissingBlocksError(
            f"{spans_text(missing)} of {self.facts.name} have no live server that this client may "
            f"use: servers that hold them are ruled out by {' and by '.join(reasons)}; change the "
            "setting, or start a server that it allows",
            missing,
        )

    def _mismatch(self, failure: MissingBlocksError | None = None) -> ModelMismatchError:
        remote = self._planner.remote
        missing = failure.missing if failure else ((remote.start, remote.end),)
        theirs = sorted({info.fingerprint[:12] for info in self._strangers.values()})
        return ModelMismatchError(
            f"{spans_text(missing)} of {self.facts.name} are served only in another revision "
            f"({', '.join(theirs)}; yours is {self.facts.fingerprint[:12]}); load the same files "
            "or --revision as the servers",
            missing,
        )

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self.config.update_period)
            try:
                await self.refresh()
            except PlanetServeError as error:
                logger.warning("cannot refresh the list of servers: %s", error)

    async def _ping_edges(self) -> None:
        """Measure servers that could be first or last in a chain, a bounded number of them."""
        remote, most = self._planner.remote, self.config.max_pinged
        now_measured = self.config.update_period / 2
        chosen: set[PeerId] = set()
        for block in (remote.start, remote.end - 1):
            edges = [
                info.peer_id
                for info in self._servers.values()
                if block in info.span and self._rtt.age_s(info.peer_id) > now_measured
            ]
            keep = _KEPT_FRESH * most
            chosen.update(whom_to_ping(edges, self._rtt, most=most, keep=keep, rng=self._rng))
        await asyncio.gather(*(self._ping(self._servers[peer_id]) for peer_id in chosen))

    async def _ping(self, info: ServerInfo) -> bool:
        try:
            rtt_ms = await ping(
                self.node, info.peer_id, info.addresses, timeout_s=self.config.ping_timeout
            )
        except PlanetServeError:
            return False
        self._rtt.add(info.peer_id, rtt_ms)
        return True

    async def _silent(self, peer_ids: Sequence[PeerId]) -> list[PeerId]:
        infos = [self._servers[peer] for peer in dict.fromkeys(peer_ids) if peer in self._servers]
        answers = await asyncio.gather(*(self._ping(info) for info in infos))
        return [info.peer_id for info, alive in zip(infos, answers, strict=True) if not alive]

    async def _revive(self) -> None:
        """Give banned servers that answer a ping another chance, since nobody else can serve."""
        banned = [self._servers[peer] for peer in self._banned_until_s if peer in self._servers]
        chosen = banned[:_MAX_REVIVED]
        answers = await asyncio.gather(*(self._ping(info) for info in chosen))
        for info, alive in zip(chosen, answers, strict=True):
            if alive:
                # Another session's call may have done so while this one waited.
                self._banned_until_s.pop(info.peer_id, None)


def _check_peer_ids(config: ClientConfig) -> None:
    """A mistyped id would block, allow or trust nobody without a word."""
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
    return _DTYPES[names.pop()] if len(names) == 1 else torch.float32


def _holds_some(info: ServerInfo, blocks: Iterable[tuple[int, int]]) -> bool:
    return any(start < info.span.end and info.span.start < end for start, end in blocks)
