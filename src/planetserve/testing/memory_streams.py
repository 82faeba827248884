"""Streams of the network in memory: frames that arrive after a delay, in order."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from planetserve.errors import HopTimeout, LocalProtocolError, StreamClosed
from planetserve.swarm.network import Buffer
from planetserve.testing.lies import Liar
from planetserve.testing.virtual_time import VirtualTimeLoop
from planetserve.types import PeerId
from planetserve.wire.frame import HEADER_BYTES, FrameHeader, FrameType

WINDOW_BYTES = 256 * 1024
"""Bytes of one direction of a stream that may be on the way or unread; a sender waits for more."""
_JITTER = 0.2
_SLOW_LATENCY_S = 2.0
_SLOW_BYTES_PER_S = 2000.0
_SPLIT_BYTES = 200
"""The header of a frame with a longer payload arrives before the rest, which may never come."""


@dataclass(slots=True)
class Arriving:
    """A frame on its way."""

    header: FrameHeader
    data: bytes
    is_whole: bool = False
    """Whether all of it has arrived, and not just the header."""

    @property
    def num_bytes(self) -> int:
        """Its size on the wire."""
        return HEADER_BYTES + len(self.data)


@dataclass(slots=True)
class Link:
    """One way between two nodes."""

    usual_latency_s: float
    usual_bytes_per_s: float
    num_slow: int = 0
    """Faults that slow it down now."""
    cut_until_s: float = 0.0
    """Nothing arrives before; infinite while nobody knows when it ends."""

    @property
    def latency_s(self) -> float:
        """How long a byte is under way."""
        return _SLOW_LATENCY_S if self.num_slow else self.usual_latency_s

    @property
    def bytes_per_s(self) -> float:
        """How much it carries."""
        return _SLOW_BYTES_PER_S if self.num_slow else self.usual_bytes_per_s


class Links(Protocol):
    """What a pipe needs of its network."""

    loop: VirtualTimeLoop
    rng: random.Random

    def now_s(self) -> float:
        """Virtual time."""
        ...

    def link(self, source: PeerId, target: PeerId) -> Link:
        """The way from one node to another."""
        ...


class StreamOwner(Protocol):
    """What a stream needs of its node."""

    loop: VirtualTimeLoop
    streams: dict[MemoryStream, None]
    liar: Liar | None

    def tell_client(self, header: FrameHeader, payload: bytes) -> None:
        """Send a frame to the client of its session."""
        ...

    def tap(self, event: str, remote: PeerId, header: FrameHeader) -> None:
        """Tell of a frame."""
        ...


class Pipe:
    """One direction of a stream."""

    def __init__(self, network: Links, source: PeerId, target: PeerId):
        self.queue: deque[Arriving] = deque()
        """Frames that have arrived; of the last one maybe only the header."""
        self.num_bytes = 0
        self.bytes_received = 0
        self.is_over = False
        """Nothing more arrives."""
        self._changed: deque[asyncio.Future[None]] = deque()
        self._network = network
        self._link = network.link(source, target)
        # When what arrives: a frame's header, the rest of a frame, or that there is nothing more.
        self._flying: deque[tuple[float, Arriving | None]] = deque()
        self._arrives_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # One timer for all waits: most waits end early, and a timer for each is expensive.
        self._deadline_timer: asyncio.TimerHandle | None = None

    def put(self, frame: Arriving | None) -> None:
        """Send a frame, or say that no other comes."""
        if frame is not None:
            self.num_bytes += frame.num_bytes
            if len(frame.data) > _SPLIT_BYTES:
                self._fly(HEADER_BYTES, frame)
                self._fly(len(frame.data), frame)
            else:
                frame.is_whole = True
                self._fly(frame.num_bytes, frame)
        else:
            self._fly(0, None)
        if self._timer is None:
            self._wait()

    def _fly(self, size: int, frame: Arriving | None) -> None:
        network, link = self._network, self._link
        took_s = link.latency_s * network.rng.uniform(1.0, 1.0 + _JITTER) + size / link.bytes_per_s
        self._arrives_s = max(self._arrives_s + size / link.bytes_per_s, network.now_s() + took_s)
        self._flying.append((self._arrives_s, frame))

    def break_off(self) -> None:
        """What has not arrived never does."""
        self._flying.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Wake all tasks that wait for the pipe."""
        while self._changed:
            _set(self._changed.popleft())

    async def wait(self, until_s: float = math.inf) -> None:
        """Wait for `wake`, at most until then. May return early: the caller checks again."""
        loop, timer = self._network.loop, self._deadline_timer
        if until_s < (math.inf if timer is None else timer.when()):
            if timer is not None:
                timer.cancel()
            self._deadline_timer = loop.call_at(until_s, self._on_deadline)
        future: asyncio.Future[None] = loop.create_future()
        self._changed.append(future)
        await future

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        self.wake()

    def stop_waiting(self) -> None:
        """Wake all tasks that wait for the pipe, for the last time."""
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        self.wake()

    def retime(self) -> None:
        """The link has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._wait()

    def _wait(self) -> None:
        due_s = max(self._flying[0][0], self._link.cut_until_s)
        self._timer = None
        if due_s < math.inf:
            self._timer = self._network.loop.call_at(due_s, self._arrive)
        else:
            # Woken by `retime`.
            self._timer = self._network.loop.call_later(1e6, self._wait)

    def _arrive(self) -> None:
        self._timer = None
        now_s = self._network.now_s()
        while self._flying and self._flying[0][0] <= now_s and self._link.cut_until_s <= now_s:
            _, frame = self._flying.popleft()
            if frame is None:
                self.is_over = True
            elif self.queue and self.queue[-1] is frame:
                frame.is_whole = True
                self.bytes_received += len(frame.data)
            else:
                self.bytes_received += frame.num_bytes if frame.is_whole else HEADER_BYTES
                self.queue.append(frame)
        self.wake()
        if self._flying:
            self._wait()


class MemoryStream:
    """One end of a stream; a `Stream`."""

    def __init__(
        self, node: StreamOwner, remote: PeerId, protocol: str, inward: Pipe, outward: Pipe
    ):
        self.remote = remote
        self.protocol = protocol
        self.inward = inward
        self.outward = outward
        self.session: bytes | None = None
        """The session that the peer has opened on it."""
        self._node = node
        self._sending = asyncio.Lock()
        self._is_receiving = False
        self._is_closed = False
        self._is_broken = False
        node.streams[self] = None

    @property
    def bytes_received(self) -> int:
        return self.inward.bytes_received

    @property
    def closed(self) -> bool:
        return self._is_closed or self._is_broken

    async def send(self, header: FrameHeader, payload: Buffer | Sequence[Buffer] = b"") -> None:
        data = bytes(payload) if isinstance(payload, Buffer) else b"".join(map(bytes, payload))
        if header.payload_bytes != len(data):
            header = header.numbered(header.sequence, len(data))
        header = FrameHeader.unpack(header.pack())
        async with self._sending:
            while not self.closed and self.outward.num_bytes >= WINDOW_BYTES:
                await self.outward.wait()
            if self.closed:
                raise StreamClosed("the stream is closed")
            liar = self._node.liar
            if liar is None:
                self.outward.put(Arriving(header, data))
            else:
                for frame in liar.sent((header, data), self.remote, self._node.tell_client):
                    self.outward.put(Arriving(*frame))
        self._node.tap("sent", self.remote, header)

    def inject(self, header: FrameHeader, data: bytes) -> None:
        """Send a frame that the node itself knows nothing of."""
        if not self.closed:
            self.outward.put(Arriving(header.numbered(header.sequence, len(data)), data))

    async def peek(self, timeout_s: float | None = None) -> FrameHeader:
        return (await self._next(timeout_s, is_whole=False)).header

    async def receive(self, timeout_s: float | None = None) -> tuple[FrameHeader, bytearray]:
        frame = await self._next(timeout_s, is_whole=True)
        self.inward.queue.popleft()
        self.inward.num_bytes -= frame.num_bytes
        self.inward.wake()
        if frame.header.type is FrameType.OPEN:
            self.session = frame.header.session
        self._node.tap("received", self.remote, frame.header)
        return frame.header, bytearray(frame.data)

    async def _next(self, timeout_s: float | None, *, is_whole: bool) -> Arriving:
        if self._is_receiving:
            raise LocalProtocolError("another task is receiving from this stream")
        self._is_receiving = True
        now_s = self._node.loop.time
        until_s = math.inf if timeout_s is None else now_s() + timeout_s
        try:
            while True:
                if self._is_closed:
                    raise StreamClosed("the stream is closed")
                queue = self.inward.queue
                if queue and (queue[0].is_whole or not is_whole):
                    return queue[0]
                if self.inward.is_over:
                    self.abort()
                    raise StreamClosed("the peer closed the stream")
                if now_s() >= until_s:
                    raise HopTimeout("no frame in time")
                await self.inward.wait(until_s)
        finally:
            self._is_receiving = False

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._node.streams.pop(self, None)
        if not self._is_broken:
            self.outward.put(None)
        self.inward.stop_waiting()
        self.outward.wake()

    def break_off(self) -> None:
        """The connection is gone."""
        self._is_broken = True
        self.inward.break_off()
        self.outward.wake()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
