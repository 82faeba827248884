"""Where a peer can be dialled, told to peers that know only its id, by this process instead of the
daemon.

The daemon asks others' daemons when it is to connect to a peer without an address. The daemon's own
answering holds half-sent messages for minutes, as many as there are streams, and for each at once
the 4 MiB that its first bytes may announce. Here such a stream is an incoming one like any other:
few per peer and in all (`node.py`), ended when nothing comes, with messages of a few bytes, and a
peer may ask as often as it may ask the directory. Of libp2p's Kademlia (`/ipfs/kad/1.0.0`) only
FIND_NODE and PING are answered; nothing is stored.
"""

from __future__ import annotations

import asyncio
import heapq
import socket
from collections.abc import Callable, Collection
from hashlib import sha256

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from planetserve.clock import Clock
from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import PlanetServeError, RemoteProtocolError
from planetserve.swarm.libp2p.daemon import Daemon
from planetserve.swarm.libp2p.delimited import read_message, with_length
from planetserve.swarm.libp2p.kademlia_messages import FIND_NODE, PING, Message
from planetserve.swarm.libp2p.sockets import send_all
from planetserve.types import PeerId

PROTOCOL = "/ipfs/kad/1.0.0"
MAX_REQUEST_BYTES = 1024
IDLE_TIMEOUT_S = 5.0
"""Maximum seconds between requests on a stream; daemons open a new stream after it has ended."""
_ANSWER_TIMEOUT_S = 10.0
_MAX_CLOSER = 20
_MAX_ADDRESSES = 16
_CONNECTED_FOR_S = 0.2
_ADDRESSES_FOR_S = 10.0

Known = Callable[[], Collection[bytes]]
"""Returns the peers, as binary ids, whose addresses others may be told."""
Enter = Callable[[PeerId], None]
"""Counts a request of a peer; raises if it has asked for too much."""


class PeerRouting:
    """Answers from what the daemon knows of the peers that it is connected to.

    Args:
        daemon: is connected to them.
        peer_id: this node's own.
        known: those of them that keep the directory; the one that is asked for may be another.
        enter: called for each request.
        clock: source of monotonic time.
    """

    def __init__(self, daemon: Daemon, peer_id: PeerId, known: Known, enter: Enter, clock: Clock):
        self._daemon = daemon
        self._own_id = peer_id_bytes(peer_id)
        self._known = known
        self._enter = enter
        self._clock = clock
        self._asking = asyncio.Lock()
        self._connected: frozenset[bytes] = frozenset()
        self._connected_until_s = float("-inf")
        self._addresses: dict[bytes, tuple[float, list[bytes]]] = {}

    async def serve(self, sock: socket.socket, head: bytes, remote: PeerId) -> None:
        """Answer the requests on a stream, and close it.

        Args:
            sock: the stream; what is left of it is closed here.
            head: bytes of it that have been read.
            remote: who opened it.

        Raises:
            TimeoutError: no request came, or an answer was not taken.
            OSError: the stream broke.
            EOFError: it ended.
            RemoteProtocolError: something else than a request that is answered here.
            QueueFull: the peer has asked for too much.
            TransportError: the daemon does not answer.
        """
        asker = peer_id_bytes(remote)
        with sock:
            sock.setblocking(False)
            while True:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    request, head = await read_message(sock, head, MAX_REQUEST_BYTES)
                self._enter(remote)
                kind, key = _parse(request)
                answer = Message(type=kind)
                if kind == FIND_NODE:
                    for peer, addresses in await self._closest(key, asker):
                        answer.closer_peers.add(id=peer, addrs=addresses)
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    await send_all(sock, with_length(answer))

    async def _closest(self, key: bytes, asker: bytes) -> list[tuple[bytes, list[bytes]]]:
        """Peers with their addresses: the one asked for, and those next to it."""
        if key == self._own_id:
            found = [key]
        else:
            connected = await self._now_connected()
            known = connected.intersection(self._known())
            place = _place(key)
            found = heapq.nsmallest(_MAX_CLOSER, known, key=lambda peer: _place(peer) ^ place)
            if key in connected and key not in found:
                found.append(key)
        found = [peer for peer in found if peer != asker]
        places = await asyncio.gather(*map(self._addresses_of, found))
        return [pair for pair in zip(found, places, strict=True) if pair[1]]

    async def _now_connected(self) -> frozenset[bytes]:
        async with self._asking:
            if self._clock.monotonic() >= self._connected_until_s:
                self._connected = frozenset(await self._daemon.connected())
                self._connected_until_s = self._clock.monotonic() + _CONNECTED_FOR_S
                for peer in self._addresses.keys() - self._connected - {self._own_id}:
                    del self._addresses[peer]
        return self._connected

    async def _addresses_of(self, peer: bytes) -> list[bytes]:
        until_s, addresses = self._addresses.get(peer, (float("-inf"), []))
        now_s = self._clock.monotonic()
        if now_s < until_s:
            return addresses
        try:
            if peer == self._own_id:
                addresses = await self._daemon.own_addresses()
            else:
                addresses = await self._daemon.addresses_of(peer)
        except PlanetServeError:
            addresses = []  # it has gone meanwhile
        self._addresses[peer] = now_s + _ADDRESSES_FOR_S, addresses[:_MAX_ADDRESSES]
        return addresses[:_MAX_ADDRESSES]


def _place(peer: bytes) -> int:
    return int.from_bytes(sha256(peer).digest(), "big")


def _parse(request: bytes) -> tuple[int, bytes]:
    """Type and key of a request.

    Raises:
        RemoteProtocolError: it is none that is answered here.
    """
    try:
        message = Message.FromString(request)
    except DecodeError:
        raise RemoteProtocolError("a question of peer routing is cut short") from None
    if message.type not in (FIND_NODE, PING):
        raise RemoteProtocolError("a question of peer routing that is not answered")
    return message.type, message.key
