"""Connections that a server makes because a client names a next hop.

A client must learn nothing from them about the server's surroundings, nor make it knock everywhere:
private places are dialled by a server that is in one, names by one that is known by a name, so
many times a minute and so many at once for each client; and every failure looks the same and takes
as long.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from planetserve.clock import Clock
from planetserve.errors import PeerUnreachable, TransportError
from planetserve.server.limits import ServerLimits
from planetserve.swarm import multiaddr
from planetserve.swarm.network import Network, Stream
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.types import PeerId
from planetserve.wire.messages import NextHop

CONNECT_TIMEOUT_S = 5.0
MAX_DIALS_PER_PEER = 32
"""At once; further ones of the same client wait for these."""


class Dials:
    """Shared by all sessions of a server."""

    def __init__(self, node: Network, limits: ServerLimits, clock: Clock):
        self._node = node
        # A session opened or rewired is one dial.
        self._buckets = TokenBuckets(limits.max_peer_opens / 60.0, limits.peer_open_burst, clock)
        self._slots: WeakValueDictionary[PeerId, asyncio.Semaphore] = WeakValueDictionary()

    async def open(self, client: PeerId, following: NextHop, protocol: str) -> Stream:
        """A stream to the hop that `client` names.

        Raises:
            PeerUnreachable: there is none; always after `CONNECT_TIMEOUT_S`.
        """
        slots = self._slots.get(client)
        if slots is None:
            slots = self._slots[client] = asyncio.Semaphore(MAX_DIALS_PER_PEER)
        async with slots:
            loop = asyncio.get_running_loop()
            over_s = loop.time() + CONNECT_TIMEOUT_S
            try:
                return await self._dial(client, following, protocol)
            except TransportError:
                await asyncio.sleep(over_s - loop.time())
                raise PeerUnreachable("the next hop cannot be reached") from None

    async def _dial(self, client: PeerId, following: NextHop, protocol: str) -> Stream:
        if self._buckets.take(client):
            raise PeerUnreachable("too many dials for one client")
        addresses = multiaddr.permitted(self._node.addresses(), following.addresses)
        if following.addresses and not addresses:
            # One that has connected by itself can be reached, wherever it is.
            if not await self._node.is_connected(following.peer_id):
                raise PeerUnreachable("a place that is not dialled")
        return await self._node.open_stream(
            following.peer_id, addresses, protocol, CONNECT_TIMEOUT_S
        )
