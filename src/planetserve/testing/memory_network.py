"""A network in one process and in virtual time: nodes, links between them, and their faults.

`MemoryNode` is a `Network` as `SwarmNode` is one. Frames of a stream arrive in order, after the
link's latency and as fast as it carries them, and wait for as long as the link is cut; streams
break when a cut lasts, when they are reset, or when a node ends. Records are in one table, like
those of a directory's keepers; they are visible a moment after they were stored.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

from planetserve.crypto.identity import Identity
from planetserve.errors import (
    PeerUnreachable,
    PlanetServeError,
    RemoteProtocolError,
    TransportError,
)
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.network import FrameTap, Records, StreamHandler
from planetserve.swarm.records import RecordChecker, key_digest
from planetserve.testing.lies import Liar
from planetserve.testing.memory_streams import Link, MemoryStream, Pipe
from planetserve.testing.virtual_time import ClockError, VirtualClock, VirtualTimeLoop
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader

logger = logging.getLogger(__name__)

BREAKS_AFTER_S = 40.0
"""Seconds of a cut after which connections over the link break."""
_RECORD_DELAY_S = 1.0
_LOOPBACK_S = 5e-5
_LOOPBACK_BYTES_PER_S = 1e9


class MemoryNode:
    """A node; a `Network`. Made by `MemoryNetwork.join`."""

    def __init__(self, network: MemoryNetwork, identity: Identity, error: ClockError):
        self.loop = network.loop
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        self.machine_clock = VirtualClock(network.loop, error)
        self.clock = SwarmClock(self.machine_clock)
        self.clock.correct([-error.ahead_s])
        self.records = RecordChecker(self.clock)
        self.records._passed = network.checker._passed  # noqa: SLF001 - it takes most of the time
        self.refused: Counter[str] = Counter()
        self.taps: list[FrameTap] = []
        self.send_rates = PeerEwma(max_peers=64, clock=self.machine_clock)
        self.stopped = asyncio.Event()
        self.streams: dict[MemoryStream, None] = {}
        self.handlers: dict[str, StreamHandler] = {}
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.liar: Liar | None = None
        """Changes the frames that this node sends, while it is hostile."""
        self._network = network

    def addresses(self) -> tuple[str, ...]:
        return (f"/ip4/8.8.8.8/tcp/31337/p2p/{self.peer_id}",)

    def tap(self, event: str, remote: PeerId, header: FrameHeader) -> None:
        """Tell every tap of a frame."""
        for tap in self.taps:
            tap(event, remote, header)

    def tell_client(self, header: FrameHeader, payload: bytes) -> None:
        """Send a frame to the client of its session."""
        for stream in self.streams:
            if stream.session == header.session:
                stream.inject(header, payload)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._network.loop.create_task(work, name=name)
        self.tasks[task] = None
        task.add_done_callback(lambda done: self.tasks.pop(done, None))

    async def is_connected(self, peer_id: PeerId) -> bool:
        return self._network.is_connected(self.peer_id, peer_id)

    async def open_stream(
        self, peer_id: PeerId, addresses: Sequence[str], protocol: str, timeout_s: float
    ) -> MemoryStream:
        if self.stopped.is_set():
            raise PeerUnreachable("this node is closed")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._network.open_stream(self, peer_id, protocol)
        except TimeoutError:
            raise PeerUnreachable("no answer in time") from None

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    def accept(self, protocol: str, stream: MemoryStream) -> None:
        """Serve a stream that another node has opened."""
        self.spawn(self._serve(self.handlers[protocol], stream), protocol)

    async def _serve(self, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except PlanetServeError as error:
            logger.debug("a stream ended: %s", error.code)
        except Exception:
            logger.exception("a stream's handler failed")
        finally:
            stream.abort()

    async def put_record(
        self, key: bytes, envelope: bytes, expires_at_s: float, timeout_s: float
    ) -> None:
        await self._network.use_directory(self, timeout_s)
        self._network.store(key, self.peer_id, envelope, expires_at_s)

    async def get_records(self, keys: Sequence[bytes], timeout_s: float) -> Records:
        await self._network.use_directory(self, timeout_s)
        return {key: self._network.stored(key) for key in keys}

    async def close(self) -> None:
        if self.stopped.is_set():
            return
        self.stopped.set()
        for stream in list(self.streams):
            stream.abort()
        await self._end()

    async def crash(self, *, is_silent: bool) -> None:
        """End like a killed process, or if `is_silent` like a machine without power."""
        self.stopped.set()
        self._network.lose(self, is_silent=is_silent)
        await self._end()

    async def _end(self) -> None:
        own = asyncio.current_task()
        tasks = [task for task in self.tasks if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._network.leave(self)


class MemoryNetwork:
    """Nodes and links.

    Args:
        loop: whose time it goes by.
        rng: draws latencies and rates of links, and delays.
    """

    def __init__(self, loop: VirtualTimeLoop, rng: random.Random):
        self.loop = loop
        self.rng = rng
        self.nodes: dict[PeerId, MemoryNode] = {}
        self.cut_off: dict[PeerId, float] = {}
        """Until when a node does not reach the directory."""
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._silent: dict[PeerId, None] = {}
        self._connections: dict[tuple[PeerId, PeerId], dict[MemoryStream, MemoryStream]] = {}
        self._records: dict[bytes, dict[PeerId, list[tuple[float, bytes, float]]]] = {}
        self.checker = RecordChecker(VirtualClock(loop))
        """The directory's; nodes do not check a signature again that it has checked."""

    def now_s(self) -> float:
        """The loop's time."""
        return self.loop.time()

    def join(self, identity: Identity, error: ClockError) -> MemoryNode:
        """A new node, or one that comes back; its clock goes with this error."""
        node = MemoryNode(self, identity, error)
        self.nodes[node.peer_id] = node
        self._silent.pop(node.peer_id, None)
        return node

    def leave(self, node: MemoryNode) -> None:
        """The node is gone."""
        if self.nodes.get(node.peer_id) is node:
            del self.nodes[node.peer_id]

    def link(self, source: PeerId, target: PeerId) -> Link:
        """The way from one node to another."""
        found = self._links.get((source, target))
        if found is None:
            if source == target:
                self._links[source, target] = Link(_LOOPBACK_S, _LOOPBACK_BYTES_PER_S)
                return self._links[source, target]
            latency_s = self.rng.choice((0.001, 0.01, 0.05, 0.15))
            rate = self.rng.choice((1e5, 1e6, 1e7))
            self._links[source, target] = found = Link(latency_s, rate)
            self._links[target, source] = Link(latency_s, rate)
        return found

    def cut(self, source: PeerId, target: PeerId, until_s: float) -> None:
        """Let nothing through until then."""
        link = self.link(source, target)
        link.cut_until_s = max(link.cut_until_s, until_s)
        self._retime(source, target)
        if until_s - self.now_s() > BREAKS_AFTER_S:
            self.loop.call_later(BREAKS_AFTER_S, self._break_if_cut, source, target)

    def heal(self, source: PeerId, target: PeerId) -> None:
        """Let everything through again."""
        self.link(source, target).cut_until_s = 0.0
        self._retime(source, target)

    def break_connection(self, one: PeerId, other: PeerId) -> None:
        """Break every stream between two nodes."""
        for stream, far in self._connections.pop(_pair(one, other), {}).items():
            stream.break_off()
            far.break_off()

    def is_connected(self, one: PeerId, other: PeerId) -> bool:
        """Whether two nodes have a connection."""
        return other in self.nodes and _pair(one, other) in self._connections

    def lose(self, node: MemoryNode, *, is_silent: bool) -> None:
        """A node's streams break; if it `is_silent`, others learn of it only when they time out."""
        if is_silent:
            self._silent[node.peer_id] = None
        for pair in [pair for pair in self._connections if node.peer_id in pair]:
            other = pair[0] if pair[1] == node.peer_id else pair[1]
            if is_silent:
                for stream, far in self._connections[pair].items():
                    (stream if stream in node.streams else far).break_off()
                self.loop.call_later(BREAKS_AFTER_S, self.break_connection, *pair)
            else:
                latency_s = self.link(node.peer_id, other).latency_s
                streams = self._connections.pop(pair)
                self.loop.call_later(latency_s, _break_all, streams)
        for stream in list(node.streams):
            stream.break_off()
            stream.abort()

    async def open_stream(self, node: MemoryNode, remote: PeerId, protocol: str) -> MemoryStream:
        """Connect if need be, and open a stream."""
        there, back = self.link(node.peer_id, remote), self.link(remote, node.peer_id)
        round_trips = 1 if self.is_connected(node.peer_id, remote) else 3
        await asyncio.sleep(round_trips * (there.latency_s + back.latency_s))
        while (until_s := max(there.cut_until_s, back.cut_until_s)) > self.now_s():  # noqa: ASYNC110
            await asyncio.sleep(min(1.0, until_s - self.now_s()))  # it may be healed
        while remote in self._silent:  # noqa: ASYNC110 - rare, and time costs nothing here
            await asyncio.sleep(1.0)
        if remote not in self.nodes or self.nodes[remote].stopped.is_set():
            raise PeerUnreachable("nobody listens there")
        target = self.nodes[remote]
        if protocol not in target.handlers:
            raise PeerUnreachable("the peer does not serve the protocol")
        if node.stopped.is_set():
            raise PeerUnreachable("this node was closed meanwhile")
        outward, inward = Pipe(self, node.peer_id, remote), Pipe(self, remote, node.peer_id)
        near = MemoryStream(node, remote, protocol, inward, outward)
        far = MemoryStream(target, node.peer_id, protocol, outward, inward)
        streams = self._connections.setdefault(_pair(node.peer_id, remote), {})
        for stream in [
            stream for stream, other in streams.items() if stream.closed and other.closed
        ]:
            del streams[stream]
        streams[near] = far
        target.accept(protocol, far)
        return near

    async def use_directory(self, node: MemoryNode, timeout_s: float) -> None:
        """Wait for as long as a look-up takes.

        Raises:
            TransportError: nobody answers.
        """
        if node.stopped.is_set():
            raise TransportError("this node is closed")
        await asyncio.sleep(self.rng.uniform(0.05, 0.5))
        if self.cut_off.get(node.peer_id, 0.0) > self.now_s():
            await asyncio.sleep(timeout_s)
            raise TransportError("the directory did not answer")
        if node.stopped.is_set():
            raise TransportError("this node is closed")

    def store(self, key: bytes, owner: PeerId, envelope: bytes, expires_at_s: float) -> None:
        """Keep a record, as a keeper of the directory would.

        Raises:
            TransportError: it is refused.
        """
        try:
            self.checker.check(key_digest(key), owner, envelope, expires_at_s)
        except RemoteProtocolError as error:
            raise TransportError(f"no peer took the record: {error}") from None
        versions = self._records.setdefault(key, {}).setdefault(owner, [])
        seen_s = self.now_s() + self.rng.uniform(0.0, _RECORD_DELAY_S)
        versions.append((seen_s, envelope, expires_at_s))
        del versions[:-4]

    def stored(self, key: bytes) -> dict[PeerId, tuple[bytes, float]]:
        """What a look-up finds now."""
        now_s, found = self.now_s(), {}
        for owner, versions in self._records.get(key, {}).items():
            seen = [version for version in versions if version[0] <= now_s]
            if seen:
                latest = max(seen, key=lambda version: version[2])
                found[owner] = latest[1], latest[2]
        return found

    def _retime(self, source: PeerId, target: PeerId) -> None:
        for stream, far in self._connections.get(_pair(source, target), {}).items():
            for pipe in (stream.inward, far.inward):
                pipe.retime()

    def _break_if_cut(self, source: PeerId, target: PeerId) -> None:
        if self.link(source, target).cut_until_s > self.now_s():
            self.break_connection(source, target)


def _pair(one: PeerId, other: PeerId) -> tuple[PeerId, PeerId]:
    return (one, other) if one < other else (other, one)


def _break_all(streams: dict[MemoryStream, MemoryStream]) -> None:
    for stream, far in streams.items():
        stream.break_off()
        far.break_off()
