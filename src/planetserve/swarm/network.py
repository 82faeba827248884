"""What a role needs of the network: a node, its streams, records of the directory.

Client and server are written against these protocols. `node.py` implements them with libp2p and
hivemind; `testing/memory_network.py` does without either, in virtual time, for tests that throw
faults at whole swarms.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from planetserve.crypto.identity import Identity
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.node_config import NodeConfig
from planetserve.swarm.records import RecordChecker
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader

Buffer = bytes | bytearray | memoryview
FrameTap = Callable[[str, PeerId, FrameHeader], None]
"""Called with "sent" or "received", the remote peer and the header of each frame."""
Call = Callable[[bytes, PeerId], Awaitable[bytes]]
"""Takes a request and who sent it; of what it raises, the caller is told no more than a code."""
Records = Mapping[bytes, Mapping[PeerId, tuple[bytes, float]]]
"""Key -> owner -> (envelope, Unix time at which it ends)."""


class Stream(Protocol):
    """A bidirectional stream of frames with one authenticated peer; see `FrameStream`."""

    @property
    def remote(self) -> PeerId:
        """The peer at the other end."""
        ...

    @property
    def bytes_received(self) -> int:
        """Bytes read so far, those of a frame that is still under way included."""
        ...

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        ...

    async def send(self, header: FrameHeader, payload: Buffer | Sequence[Buffer] = b"") -> None:
        """Send one frame; return when the system has taken all of it."""
        ...

    async def peek(self, timeout_s: float | None = None) -> FrameHeader:
        """The header of the next frame, which `receive` returns with its payload."""
        ...

    async def receive(self, timeout_s: float | None = None) -> tuple[FrameHeader, bytearray]:
        """The next frame."""
        ...

    async def close(self) -> None:
        """Close this end; frames already sent still arrive."""
        ...

    def abort(self) -> None:
        """Close this end now, and wake the tasks that wait on it."""
        ...


StreamHandler = Callable[[Any], Coroutine[Any, Any, None]]
"""Serves one incoming `Stream`."""


class Network(Protocol):
    """One process's place in the swarm; see `SwarmNode`."""

    identity: Identity
    clock: SwarmClock
    records: RecordChecker
    refused: Counter[str]
    stopped: asyncio.Event
    """Set once the node no longer works."""

    @property
    def peer_id(self) -> PeerId:
        """The name of this node."""
        ...

    @property
    def taps(self) -> list[FrameTap]:
        """Told of every frame that is sent or received."""
        ...

    @property
    def send_rates(self) -> PeerEwma:
        """Bytes per second that peers took from this node, where it had to wait for them."""
        ...

    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses, with the peer id, at which others reach this node."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` in a task that this node owns and cancels when it closes."""
        ...

    async def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer."""
        ...

    async def open_stream(
        self, peer_id: PeerId, addresses: Sequence[str], protocol: str, timeout_s: float
    ) -> Stream:
        """Connect to a peer, unless connected already, and open a stream of `protocol` to it.

        Raises:
            PeerUnreachable: no connection in time, or the peer does not serve the protocol.
        """
        ...

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Call `handler` in a task of its own for every stream of `protocol` that a peer opens.

        The stream is closed when the handler returns or fails.
        """
        ...

    async def put_record(
        self, key: bytes, envelope: bytes, expires_at_s: float, timeout_s: float
    ) -> None:
        """Store a record of this node in the directory.

        Raises:
            TransportError: no peer took it.
        """
        ...

    async def get_records(self, keys: Sequence[bytes], timeout_s: float) -> Records:
        """All records under `keys`.

        Raises:
            TransportError: the directory did not answer in time.
        """
        ...

    async def close(self) -> None:
        """Leave the swarm: end every stream and task of this node. Idempotent."""
        ...


Join = Callable[[NodeConfig], Awaitable[Network]]
"""Makes a node that has joined the swarm."""
