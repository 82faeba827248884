"""One process's place in the swarm: a libp2p daemon and a DHT node on the running event loop.

`SwarmNode.start` launches the daemon (`daemon.py`), joins through the initial peers and keeps the
node joined; `close` leaves nothing behind: no task, process, socket file or thread. The node owns
the tasks of incoming streams. It knows nothing of models, of what records mean (`directory.py`) or
of frames (`streams.py`).

Works in any running loop, in the main thread (server) or in another one (client).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from hivemind.dht.node import DHTNode

from planetserve.clock import Clock, SystemClock
from planetserve.crypto.identity import Identity, claimed, peer_id_bytes
from planetserve.errors import (
    ConfigError,
    PeerUnreachable,
    PlanetServeError,
    RemoteProtocolError,
    TransportError,
)
from planetserve.swarm import multiaddr
from planetserve.swarm.dht import operations
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.libp2p import peer_routing, refused_protocols
from planetserve.swarm.libp2p.daemon import Daemon
from planetserve.swarm.libp2p.peer_routing import PeerRouting
from planetserve.swarm.libp2p.request_limiter import RequestLimiter
from planetserve.swarm.libp2p.sockets import raise_file_limit
from planetserve.swarm.libp2p.streams import (
    FrameStream,
    StreamHandler,
    open_stream,
    serve_streams,
    short,
)
from planetserve.swarm.libp2p.unary_rpc import Call, Unsent, answer
from planetserve.swarm.network import FrameTap, Records
from planetserve.swarm.node_config import NodeConfig
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.swarm.records import RecordChecker
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader

__all__ = [
    "MAX_LARGE_FRAMES_PER_PEER", "MAX_STREAMS", "STREAMS_SHARE_PER_PEER", "NodeConfig", "SwarmNode",
]  # fmt: skip

logger = logging.getLogger(__name__)

MAX_STREAMS = 4096
"""Incoming streams that are held at once; further ones are closed unheard. Fewer where the system
allows a process few files: a stream is one, and a quarter of them goes to streams."""
STREAMS_SHARE_PER_PEER = 4
"""One peer may have one in so many of them."""
MAX_LARGE_FRAMES_PER_PEER = 8
"""Frames over 64 KiB that are received from one peer at once; a peer's further ones wait."""

_REJOIN_PERIOD_S = 10.0
_MAX_MEASURED_PEERS = 64

Serve = Callable[[socket.socket, bytes, PeerId], Coroutine[Any, Any, None]]
"""Serves an incoming stream: its socket, bytes of it that were read already, who opened it."""


class SwarmNode:
    """A running node. Made by `start`; an async context manager that closes itself."""

    def __init__(self, config: NodeConfig, identity: Identity, clock: Clock, daemon: Daemon):
        self.config = config
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        self.clock = SwarmClock(clock)
        self.records = RecordChecker(self.clock)
        self.refused: Counter[str] = Counter()
        """How often what was turned away: `stream`, one too many; `call`, without a request to the
        directory in time; `lookup`, such a request too many; `route`, a question too many where
        another peer is; `libp2p`, a stream of a protocol that only the daemon would serve."""
        self.taps: list[FrameTap] = []
        self.send_rates = PeerEwma(max_peers=_MAX_MEASURED_PEERS, clock=clock)
        """Bytes per second that peers took from this node, where it had to wait for them."""
        self.streams: set[FrameStream] = set()
        self.protocols: dict[str, StreamHandler] = {}
        self.calls: dict[str, Call] = {}
        """What others may call, by protocol name: the directory."""
        self._unsent = Unsent()
        self.stopped = asyncio.Event()
        """Set once the node no longer works: it was closed, or its daemon died."""
        self._daemon = daemon
        self._resources = contextlib.ExitStack()
        self._dht: DHTNode | None = None
        self._addresses: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._max_streams = MAX_STREAMS
        self._num_incoming: Counter[PeerId] = Counter()
        self._large_slots: WeakValueDictionary[PeerId, asyncio.Semaphore] = WeakValueDictionary()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: NodeConfig, clock: Clock | None = None) -> SwarmNode:
        """Launch the daemon, listen, and join the swarm.

        Raises:
            ConfigError: a port is taken, an address cannot be listened on, the key file is bad.
            PeerUnreachable: no initial peer answered; the message lists who was tried.
            TransportError: the daemon did not start.
        """
        resources = contextlib.ExitStack()
        if config.identity_path is None:
            identity = Identity.generate()
        else:
            identity = Identity.load_or_create(config.identity_path)
            resources.enter_context(claimed(Path(config.identity_path)))
        # A client, in somebody else's program, has few streams and leaves that program's limits be.
        max_streams = MAX_STREAMS
        if not config.client_mode:
            max_streams = min(MAX_STREAMS, raise_file_limit() // 4)
        with resources:
            daemon = await Daemon.start(config, identity)
            node = cls(config, identity, clock or SystemClock(), daemon)
            node._max_streams = max_streams
            node._resources = resources.pop_all()
        try:
            node.spawn(node._watch(), "p2pd watch")
            await refused_protocols.refuse(daemon, use_relay=config.use_relay, refused=node.refused)
            node._addresses = await daemon.addresses(node.peer_id)
            await node._join()
        except BaseException:
            await node.close()
            raise
        return node

    async def __aenter__(self) -> SwarmNode:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def dht(self) -> DHTNode:
        """The DHT node.

        Raises:
            TransportError: the node is not running.
        """
        if self._dht is None or self.stopped.is_set():
            raise TransportError("this node is closed")
        return self._dht

    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses, with the peer id, at which others reach this node."""
        return self._addresses

    def tap(self, event: str, remote: PeerId, header: FrameHeader) -> None:
        """Tell every tap of a frame."""
        for tap in self.taps:
            tap(event, remote, header)

    def large_slots(self, remote: PeerId) -> asyncio.Semaphore:
        """What bounds the memory that one peer's half-received frames take."""
        slots = self._large_slots.get(remote)
        if slots is None:
            slots = self._large_slots[remote] = asyncio.Semaphore(MAX_LARGE_FRAMES_PER_PEER)
        return slots

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` in a task that this node owns and cancels when it closes."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("task %r failed: %s", task.get_name(), type(error).__name__)

    async def connect(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Make sure there is a connection to a peer, within `connect_timeout_s`.

        Raises:
            PeerUnreachable: there is none; with no usable address, peers were asked for one.
        """
        await self._daemon.connect(peer_id, addresses, self.config.connect_timeout_s)

    async def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer.

        Raises:
            TransportError: the daemon does not answer.
        """
        return peer_id_bytes(peer_id) in await self._daemon.connected()

    async def open_socket(self, peer_id: PeerId, protocol: str) -> socket.socket:
        """Open a raw stream to a connected peer.

        Raises:
            PeerUnreachable: the peer is not connected or does not serve the protocol.
        """
        return await self._daemon.open_socket(peer_id, protocol)

    async def open_stream(
        self, peer_id: PeerId, addresses: Sequence[str], protocol: str, timeout_s: float
    ) -> FrameStream:
        """As `streams.open_stream`."""
        return await open_stream(self, peer_id, addresses, protocol, timeout_s)

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """As `streams.serve_streams`."""
        await serve_streams(self, protocol, handler)

    async def put_record(
        self, key: bytes, envelope: bytes, expires_at_s: float, timeout_s: float
    ) -> None:
        """Store a record of this node in the directory; as `operations.put`."""
        await operations.put(self.dht, key, self.peer_id, envelope, expires_at_s, timeout_s)

    async def get_records(self, keys: Sequence[bytes], timeout_s: float) -> Records:
        """All records under `keys`; as `operations.get`."""
        return await operations.get(self.dht, keys, timeout_s)

    async def add_protocol(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` in a task of this node for each incoming stream of `protocol`.

        Raises:
            ConfigError: the protocol has a handler already.
            TransportError: the daemon does not answer.
        """
        if protocol in self.protocols:
            raise ConfigError(f"protocol {protocol} has a handler already")
        self.protocols[protocol] = handler

        async def serve(sock: socket.socket, head: bytes, remote: PeerId) -> None:
            stream = FrameStream(self, sock, remote, head)
            try:
                await handler(stream)
            finally:
                stream.abort()

        try:
            await self._accept(protocol, serve)
        except BaseException:
            del self.protocols[protocol]
            raise

    async def _serve_call(self, protocol: str) -> None:
        async def serve(sock: socket.socket, head: bytes, remote: PeerId) -> None:
            try:
                await answer(sock, head, remote, self.calls[protocol], self._unsent)
            except (OSError, EOFError, TimeoutError, RemoteProtocolError):
                self.refused["call"] += 1

        await self._accept(protocol, serve)

    def _request_limiter(self, name: str) -> RequestLimiter:
        buckets = TokenBuckets(
            self.config.max_peer_lookups / 60.0, self.config.peer_lookup_burst, self.clock
        )
        return RequestLimiter(buckets, self.refused, name)

    async def _serve_peer_routing(self, dht_node: DHTNode) -> None:
        request_limiter = self._request_limiter("route")
        routing = PeerRouting(
            self._daemon,
            self.peer_id,
            known=lambda: operations.known(dht_node),
            enter=lambda remote: request_limiter.enter(remote, num_keys=1),
            clock=self.clock,
        )

        async def serve(sock: socket.socket, head: bytes, remote: PeerId) -> None:
            # How a daemon ends its streams, and what it wants of others that are no servers of
            # this kind, is not worth a word.
            with contextlib.suppress(PlanetServeError, OSError, EOFError, TimeoutError):
                await routing.serve(sock, head, remote)

        await self._accept(peer_routing.PROTOCOL, serve)

    async def _accept(self, protocol: str, serve: Serve) -> None:
        """Run `serve` in a task of this node for each incoming stream that there is room for."""

        async def counted(sock: socket.socket, head: bytes, remote: PeerId) -> None:
            try:
                await serve(sock, head, remote)
            finally:
                self._num_incoming[remote] -= 1
                if not self._num_incoming[remote]:
                    del self._num_incoming[remote]

        def accept(remote: PeerId, sock: socket.socket, head: bytes) -> None:
            if not self._may_accept(remote):
                sock.close()
                self.refused["stream"] += 1
                logger.debug("refused a stream from %s: too many, or closing", short(remote))
                return
            self._num_incoming[remote] += 1
            self.spawn(counted(sock, head, remote), f"{protocol} from {short(remote)}")

        await self._daemon.add_protocol(protocol, accept)

    def _may_accept(self, remote: PeerId) -> bool:
        if self._closing is not None or self._num_incoming.total() >= self._max_streams:
            return False
        return self._num_incoming[remote] < max(1, self._max_streams // STREAMS_SHARE_PER_PEER)

    async def _watch(self) -> None:
        code = await self._daemon.wait()
        if self._closing is None:
            self.stopped.set()
            logger.error("the libp2p daemon ended (code %s); this node is off the network", code)

    async def _join(self) -> None:
        places: dict[PeerId, list[str]] = {}
        for text in self.config.initial_peers:
            peer_id = multiaddr.parse_peer(text).peer_id
            if peer_id is not None and peer_id != self.peer_id:
                places.setdefault(peer_id, []).append(text)
        outcomes = await asyncio.gather(
            *(self.connect(peer_id, addresses) for peer_id, addresses in places.items()),
            return_exceptions=True,
        )
        failed = [error for error in outcomes if isinstance(error, BaseException)]
        if failed and len(failed) == len(places):
            tried = "; ".join(str(error) for error in failed)
            raise PeerUnreachable(
                f"no initial peer answered ({', '.join(self.config.initial_peers)}): {tried}"
            )
        self._dht = await operations.create(
            self._daemon.p2p, self.peer_id, self.records, self.clock, places,
            client_mode=self.config.client_mode,
        )  # fmt: skip
        if not self.config.client_mode:
            self.calls.update(self._dht.protocol.served(self._request_limiter("lookup")))
            await asyncio.gather(*map(self._serve_call, self.calls))
            await self._serve_peer_routing(self._dht)
        await operations.bootstrap(self._dht, places, required=bool(places))
        if places:
            self.spawn(self._keep_joined(places), "keep joined")

    async def _keep_joined(self, places: dict[PeerId, list[str]]) -> None:
        """Greet initial peers that the DHT has lost sight of, so that a broken network heals."""
        while True:
            await asyncio.sleep(_REJOIN_PERIOD_S)
            if self.stopped.is_set():
                return
            lost = [peer_id for peer_id in places if not operations.knows(self.dht, peer_id)]
            outcomes = await asyncio.gather(
                *(self.connect(peer_id, places[peer_id]) for peer_id in lost),
                return_exceptions=True,
            )
            found = [peer for peer, outcome in zip(lost, outcomes, strict=True) if outcome is None]
            if self.stopped.is_set():
                return
            if found:
                await operations.bootstrap(self.dht, found, required=False)
            await operations.keep_time(self.dht, places)

    async def close(self) -> None:
        """Leave the swarm: end every stream, task and process of this node. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.stopped.set()
        if self.refused:
            named = ", ".join(f"{name} x{count}" for name, count in self.refused.most_common())
            logger.info("turned away by this node since the start: %s", named)
        for stream in list(self.streams):
            stream.abort()
        tasks = [task for task in self._tasks if task is not self._closing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._dht is not None:
            self._dht.is_alive = False
        await self._daemon.close()
        self._resources.close()
