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
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hivemind.dht.node import DHTNode

from planetserve.clock import Clock, SystemClock
from planetserve.crypto.identity import Identity, claimed, peer_id_bytes
from planetserve.errors import (
    ConfigError,
    PeerUnreachable,
    PlanetServeError,
    TransportError,
)
from planetserve.swarm import multiaddr
from planetserve.swarm.dht import operations
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.libp2p import peer_routing, refused_protocols
from planetserve.swarm.libp2p.daemon import Daemon
from planetserve.swarm.libp2p.incoming import MAX_STREAMS, IncomingStreams
from planetserve.swarm.libp2p.peer_routing import PeerRouting
from planetserve.swarm.libp2p.sockets import raise_file_limit
from planetserve.swarm.libp2p.streams import FrameStream, StreamTable, short
from planetserve.swarm.libp2p.unary_rpc import CallServer
from planetserve.swarm.network import Call, FrameTap, Records, StreamHandler
from planetserve.swarm.node_config import NodeConfig
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.swarm.records import RecordChecker
from planetserve.swarm.request_limiter import RequestLimiter
from planetserve.types import PeerId

__all__ = ["NodeConfig", "SwarmNode"]

logger = logging.getLogger(__name__)

_REJOIN_PERIOD_S = 10.0


class SwarmNode:
    """A running node. Made by `start`; an async context manager that closes itself."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        clock: Clock,
        daemon: Daemon,
        max_streams: int = MAX_STREAMS,
    ):
        self.config = config
        self.identity = identity
        self.clock = SwarmClock(clock)
        self.records = RecordChecker(self.clock)
        self.refused: Counter[str] = Counter()
        """How often what was turned away: `stream`, one too many; `call`, without a request to the
        directory in time; `lookup`, such a request too many; `route`, a question too many where
        another peer is; `libp2p`, a stream of a protocol that only the daemon would serve."""
        self.stopped = asyncio.Event()
        """Set once the node no longer works: it was closed, or its daemon died."""
        self._daemon = daemon
        self._dht: DHTNode | None = None
        self._addresses: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: dict[str, StreamHandler] = {}
        self._streams = StreamTable(clock)
        self._incoming = IncomingStreams(daemon, self.spawn, self.refused, max_streams)
        self._calls = CallServer(self.refused)
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
            daemon.resources = resources.pop_all()
        node = cls(config, identity, clock or SystemClock(), daemon, max_streams)
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

    @property
    def peer_id(self) -> PeerId:
        """The name of this node."""
        return self.identity.peer_id

    @property
    def streams(self) -> set[FrameStream]:
        """Those that are open."""
        return self._streams.open

    @property
    def taps(self) -> list[FrameTap]:
        """Told of every frame that is sent or received."""
        return self._streams.taps

    @property
    def send_rates(self) -> PeerEwma:
        """Bytes per second that peers took from this node, where it had to wait for them."""
        return self._streams.send_rates

    @property
    def calls(self) -> dict[str, Call]:
        """What others may call, by protocol name: the directory."""
        return self._calls.calls

    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses, with the peer id, at which others reach this node."""
        return self._addresses

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
        """Connect to a peer, unless connected already, and open a stream of `protocol` to it.

        Args:
            peer_id: who must be at the other end; libp2p's handshake proves it.
            addresses: where to dial it; malformed ones and ones of other peers are ignored. With
                none the node asks the peers it knows.
            protocol: what the peer registered with `serve_streams`.
            timeout_s: for connecting and opening together.

        Raises:
            PeerUnreachable: no connection in time, or the peer does not serve the protocol.
        """
        if self.stopped.is_set():
            raise PeerUnreachable("this node is closed")
        if peer_id == self.peer_id:
            return self._open_to_self(protocol)
        try:
            async with asyncio.timeout(timeout_s):
                await self.connect(peer_id, addresses)
                sock = await self.open_socket(peer_id, protocol)
        except TimeoutError:
            raise PeerUnreachable(f"{short(peer_id)} did not answer in {timeout_s:g} s") from None
        if self.stopped.is_set():
            sock.close()
            raise PeerUnreachable("this node was closed meanwhile")
        return FrameStream(self._streams, sock, peer_id)

    def _open_to_self(self, protocol: str) -> FrameStream:
        """A socket pair in this process: libp2p does not dial itself."""
        if protocol not in self._handlers:
            raise PeerUnreachable(f"this node does not serve {protocol}")
        near, far = socket.socketpair()
        self.spawn(self._handle(protocol, far, b"", self.peer_id), f"{protocol} to itself")
        return FrameStream(self._streams, near, self.peer_id)

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Call `handler` in a task of its own for every stream of `protocol` that a peer opens.

        The node owns these tasks and cancels them when it closes. The stream is closed when the
        handler returns or fails; a failure is logged by its class name only, since its text may
        hold what the peer sent.

        Raises:
            ConfigError: the protocol has a handler already.
            TransportError: the daemon does not answer.
        """
        if protocol in self._handlers:
            raise ConfigError(f"protocol {protocol} has a handler already")
        self._handlers[protocol] = handler
        try:
            await self._incoming.serve(protocol, partial(self._handle, protocol))
        except BaseException:
            del self._handlers[protocol]
            raise

    async def _handle(
        self, protocol: str, sock: socket.socket, head: bytes, remote: PeerId
    ) -> None:
        stream = FrameStream(self._streams, sock, remote, head)
        try:
            await self._handlers[protocol](stream)
        except PlanetServeError as error:
            # Strangers can cause these as often as they like.
            logger.debug("stream of %s from %s ended: %s", protocol, short(remote), error.code)
        except Exception as error:  # noqa: BLE001  one stream's failure is not the node's
            failure = type(error).__name__
            logger.warning("stream of %s from %s failed: %s", protocol, short(remote), failure)
        finally:
            try:
                await stream.close()
            finally:
                stream.abort()

    async def put_record(
        self, key: bytes, envelope: bytes, expires_at_s: float, timeout_s: float
    ) -> None:
        """Store a record of this node in the directory; as `operations.put`."""
        await operations.put(self.dht, key, self.peer_id, envelope, expires_at_s, timeout_s)

    async def get_records(self, keys: Sequence[bytes], timeout_s: float) -> Records:
        """All records under `keys`; as `operations.get`."""
        return await operations.get(self.dht, keys, timeout_s)

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

        await self._incoming.serve(peer_routing.PROTOCOL, serve)

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
            await asyncio.gather(
                *(
                    self._incoming.serve(name, partial(self._calls.serve, name))
                    for name in self.calls
                )
            )
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
            self._incoming.stop()
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
