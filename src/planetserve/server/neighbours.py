"""Measures how far the servers are that may come next in a chain, a few of them at a time.

Those are the servers that can go on where this one's span ends or, since a chain may leave a server
early, that begin inside it. A round pings a bounded number of them; averages are announced while
they are fresh.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from planetserve.clock import Clock
from planetserve.errors import PlanetServeError
from planetserve.model.manifest import OwnWeights
from planetserve.swarm import multiaddr
from planetserve.swarm.directory import Directory
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.network import Network
from planetserve.swarm.ping import ping, whom_to_ping
from planetserve.swarm.records import MAX_NEXT_RTTS
from planetserve.types import BlockSpan, PeerId, ServerInfo, ServerState

PINGS_PER_ROUND = 8
_MAX_KNOWN = 128
MAX_AGE_S = 600.0
"""A round-trip time that was not measured again for this long is no longer announced."""
_PING_TIMEOUT_S = 2.0


class Neighbours:
    """Round-trip times from `node`, which serves `span`, to servers of the same weights."""

    def __init__(
        self, node: Network, directory: Directory, clock: Clock, rng: random.Random | None = None
    ):
        self._node = node
        self._directory = directory
        self._rng = rng or random.Random()
        self._rtt = PeerEwma(_MAX_KNOWN, clock, MAX_AGE_S)

    @property
    def rtt_ms(self) -> Mapping[PeerId, float]:
        """What is known, in milliseconds; a record has room for the `MAX_NEXT_RTTS` nearest."""
        return self._rtt.snapshot()

    async def measure(self, model: str, weights: OwnWeights, span: BlockSpan) -> None:
        """One round of pings. A server that does not answer is passed over.

        Raises:
            TransportError: the directory cannot be read.
        """
        found = await self._directory.lookup(model)
        others = [
            info
            for info in found
            if info.peer_id != self._node.peer_id
            and weights.are_those_of(info)
            and info.state is ServerState.ONLINE
        ]
        likely = {info.peer_id: info for info in likely_next(span, others)}
        chosen = whom_to_ping(
            list(likely), self._rtt, most=PINGS_PER_ROUND, keep=MAX_NEXT_RTTS, rng=self._rng
        )
        await asyncio.gather(*(self._ping(likely[peer_id]) for peer_id in chosen))

    async def _ping(self, info: ServerInfo) -> None:
        # Anybody may announce anything: nobody has this server knock inside its own network.
        addresses = multiaddr.permitted(self._node.addresses(), info.addresses)
        try:
            if not addresses and not await self._node.is_connected(info.peer_id):
                return
            rtt_ms = await ping(self._node, info.peer_id, addresses, _PING_TIMEOUT_S)
        except PlanetServeError:
            return
        self._rtt.add(info.peer_id, rtt_ms)


def likely_next(span: BlockSpan, others: Sequence[ServerInfo]) -> list[ServerInfo]:
    """Servers of `others` that could take over where `span` ends, or that begin inside it."""
    return [
        info
        for info in others
        if info.span.start <= span.end < info.span.end or span.start < info.span.start < span.end
    ]
