"""Discovers the servers of the model and measures how far away they are.

Owns the client's swarm node. Reads the directory on a timer and before a session starts, sorts the
records, and pings servers that a chain may start or end with. `chain_manager.py` decides what to do
with them. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence

from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.client.planning.compatibility import obstacle
from planetserve.client.planning.peer_book import PeerBook
from planetserve.clock import Clock
from planetserve.config import ClientConfig
from planetserve.errors import NoChainAvailable, PlanetServeError
from planetserve.model.manifest import OwnWeights
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.network import Join, Network
from planetserve.swarm.ping import ping
from planetserve.types import BlockSpan, PeerId, ServerInfo, ServerState

logger = logging.getLogger(__name__)

_MAX_AGE_S = 5.0
"""Maximum age in seconds of the records when a session starts."""
_MAX_REFRESH_WAIT_S = 1.0
"""Maximum seconds for which a session that starts waits for newer records."""
_MANIFEST_WAIT_S = 1.0
"""Maximum seconds for which a start waits until this client knows what its weights are."""
_KEPT_FRESH = 4
"""Multiple of `max_pinged`: the nearest servers at either end of a chain that stay measured."""


class ServerDiscovery:
    """Call `start` before use and `close` after it.

    Args:
        config: the client's settings.
        facts: facts about its model.
        remote: the blocks that the swarm runs.
        peers: where measured round-trip times go.
        clock: source of monotonic time.
        rng: chooses the servers to ping.
        join: makes the node.
    """

    def __init__(
        self,
        config: ClientConfig,
        facts: ModelFacts,
        remote: BlockSpan,
        peers: PeerBook,
        clock: Clock,
        rng: random.Random | None = None,
        join: Join = SwarmNode.start,
    ):
        self.config = config
        self.facts = facts
        self.prefix = config.dht_prefix or facts.prefix
        """The model's name in the directory."""
        self.servers: dict[PeerId, ServerInfo] = {}
        """Live servers of the model that the settings permit."""
        self.excluded: list[ServerInfo] = []
        """Live servers that `allowed_servers` or `blocked_servers` excludes."""
        self.strangers: dict[PeerId, ServerInfo] = {}
        """Live servers of another revision of the model, or of other weights under its name."""
        self.incompatible: list[ServerInfo] = []
        """Live servers whose protocol this client does not speak."""
        self.weights = OwnWeights(facts.fingerprint, facts.read_manifest)
        self._learning: asyncio.Task[None] | None = None
        self._remote = remote
        self._peers = peers
        self._clock = clock
        self._rng = rng or random.Random()
        self._join = join
        self._node: Network | None = None
        self._directory: Directory | None = None
        self._refresher: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()
        self._refreshed_s = float("-inf")

    @property
    def node(self) -> Network:
        """The running swarm node."""
        if self._node is None:
            raise NoChainAvailable("the client has not joined a swarm")
        return self._node

    async def start(self) -> None:
        """Join the swarm and look up the model's servers, now and on a timer.

        Raises:
            PeerUnreachable: none of the initial peers answers.
        """
        config = NodeConfig(
            initial_peers=self.config.initial_peers,
            client_mode=True,
            daemon_startup_timeout_s=self.config.daemon_startup_timeout,
            connect_timeout_s=self.config.connect_timeout,
        )
        if self.facts.read_manifest is not None:
            self._learning = asyncio.create_task(self._learn_manifest())
        try:
            self._node = await self._join(config)
            self._directory = Directory(self._node, self._clock)
            if self._learning is not None:
                # Files that were hashed before, or are small, are known by now.
                await self.weights.wait_settled(_MANIFEST_WAIT_S)
            await self.refresh()
        except BaseException:
            await self.close()
            raise
        self._refresher = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Leave the swarm. Idempotent."""
        tasks = [task for task in (self._refresher, self._learning) if task is not None]
        self._refresher = self._learning = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        node, self._node = self._node, None
        if node is not None:
            await node.close()

    async def refresh(self) -> None:
        """Read the directory, and ping servers whose round-trip time was not measured lately."""
        await self._look_up()
        await self._ping_edges()

    async def refresh_if_stale(self) -> None:
        """Read the directory before a session starts, unless that has just been done.

        Records that are a minute old miss the sessions that started since: sessions planned on
        them would all go to servers that were idle then.
        """
        async with self._refreshing:
            if self._clock.monotonic() - self._refreshed_s < _MAX_AGE_S:
                return
            with contextlib.suppress(PlanetServeError, TimeoutError):
                async with asyncio.timeout(_MAX_REFRESH_WAIT_S):
                    await self._look_up()

    async def other_models(self) -> list[str]:
        """Prefixes of the other models in this swarm, sorted.

        Raises:
            TransportError: the directory does not answer.
        """
        if self._directory is None:
            return []
        return sorted((await self._directory.models()).keys() - {self.prefix})

    async def ping(self, info: ServerInfo) -> bool:
        """Ping a server and record the round-trip time; returns whether it answers."""
        try:
            rtt_ms = await ping(
                self.node, info.peer_id, info.addresses, timeout_s=self.config.ping_timeout
            )
        except PlanetServeError:
            return False
        self._peers.record_rtt(info.peer_id, rtt_ms)
        return True

    async def silent(self, peer_ids: Sequence[PeerId]) -> list[PeerId]:
        """Those of `peer_ids` that are known and do not answer a ping."""
        infos = [self.servers[peer] for peer in dict.fromkeys(peer_ids) if peer in self.servers]
        answers = await asyncio.gather(*(self.ping(info) for info in infos))
        return [info.peer_id for info, alive in zip(infos, answers, strict=True) if not alive]

    async def _look_up(self) -> None:
        if self._directory is None:
            return
        found = await self._directory.lookup(self.prefix)
        online = [info for info in found if info.state is ServerState.ONLINE]
        manifest = self._announced_manifest(online)
        same = [info for info in online if self.weights.are_those_of(info, manifest)]
        self.incompatible = [info for info in same if obstacle(info)]
        ours = [info for info in same if not obstacle(info)]
        self.servers = {info.peer_id: info for info in ours if self._permitted(info.peer_id)}
        self.excluded = [info for info in ours if info.peer_id not in self.servers]
        known = {info.peer_id for info in same}
        strangers = {info.peer_id: info for info in online if info.peer_id not in known}
        for info in strangers.values():
            if info.fingerprint == self.facts.fingerprint and info.peer_id not in self.strangers:
                logger.warning(
                    "server %s is not used: it announces the files of %s, but other weights "
                    "(manifest %s, here %s); serve or load the same files",
                    info.peer_id, self.facts.name, info.manifest[:12], self.weights.manifest[:12],
                )  # fmt: skip
        self.strangers = strangers
        self._refreshed_s = self._clock.monotonic()

    def _announced_manifest(self, online: Sequence[ServerInfo]) -> str:
        """The manifest that all servers of the files that this client names announce, if it is one.

        If they do not agree, none is believed, so that nobody can have others left out.
        """
        fingerprint = self.facts.fingerprint
        told = {info.manifest for info in online if info.fingerprint == fingerprint} - {""}
        return told.pop() if len(told) == 1 else ""

    async def _learn_manifest(self) -> None:
        await self.weights.learn()
        if self.weights.manifest and self._refreshed_s > float("-inf"):
            with contextlib.suppress(PlanetServeError):  # the next look-up goes by it
                await self._look_up()

    def _permitted(self, peer_id: PeerId) -> bool:
        allowed, blocked = self.config.allowed_servers, self.config.blocked_servers
        return (allowed is None or peer_id in allowed) and peer_id not in (blocked or ())

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self.config.update_period)
            try:
                await self.refresh()
            except PlanetServeError as error:
                logger.warning("cannot refresh the list of servers: %s", error)

    async def _ping_edges(self) -> None:
        """Ping a bounded number of the servers that could be first or last in a chain."""
        most = self.config.max_pinged
        chosen: dict[PeerId, None] = {}  # in their order, unlike a set
        for block in (self._remote.start, self._remote.end - 1):
            at_end = [info.peer_id for info in self.servers.values() if block in info.span]
            chosen |= dict.fromkeys(
                self._peers.whom_to_ping(
                    at_end,
                    unmeasured_s=self.config.update_period / 2,
                    most=most,
                    keep=_KEPT_FRESH * most,
                    rng=self._rng,
                )
            )
        await asyncio.gather(*(self.ping(self.servers[peer_id]) for peer_id in chosen))
