"""Where a hop's inputs come from: whose frames count, when they are read, and what they become.

A frame is judged by its header, and admitted (`backpressure.py`) before its payload is read; then
it is opened and checked (`edge/receiver.py`). Chunks of a step that the model must see whole are
held here, within what the session has leased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planetserve.edge.chunk import StepChunk
from planetserve.edge.receiver import StepReceiver
from planetserve.errors import RemoteProtocolError
from planetserve.server.backpressure import PeerBackpressure
from planetserve.swarm.network import Stream
from planetserve.types import CLIENT
from planetserve.wire.frame import HEADER_BYTES, FrameHeader
from planetserve.wire.messages import OpenSession, PushHello
from planetserve.wire.step import StepTable

_PAYLOAD_TIMEOUT_S = 60.0
_LEAST_BYTES_PER_S = 64 * 1024
"""What is announced counts at the gate until it is here: slower than this it is given up."""

Reserve = Callable[[int], None]


@dataclass(slots=True)
class Arrived:
    """One engine step, and the chunks that brought it."""

    chunks: Sequence[StepChunk]
    table: StepTable
    hidden_TD: torch.Tensor
    num_bytes: int
    """What their frames count for at the gate."""
    arrived_s: float
    """When the last of the frames was here."""


class Upstream:
    """The receiving side of one session at one hop.

    Args:
        message: the session's OPEN.
        control: the client's stream, which brings the steps of a first hop.
        share: the session's part of the gate; closed by its owner.
        receiver: this end of the edge.
        chunkable: whether the engine takes steps in parts.
        reserve: leases room for a step of so many tokens, or raises.
    """

    def __init__(
        self,
        message: OpenSession,
        control: Stream,
        share: PeerBackpressure,
        receiver: StepReceiver,
        *,
        chunkable: bool,
        reserve: Reserve,
    ):
        self.stream: Stream | None = control if message.previous == CLIENT else None
        """What brings the steps, once it is here."""
        self.previous = message.previous
        self.last_frame_s = 0.0
        """Monotonic time of the latest frame."""
        self._edge = message.edge
        self._control = control
        self._epoch = message.epoch
        self._share = share
        self._receiver = receiver
        self._chunkable = chunkable
        self._reserve = reserve
        self._held: list[StepChunk] = []
        self._num_held_bytes = 0
        self._num_questions = 0

    @property
    def is_control(self) -> bool:
        """Whether the client's own stream brings the steps."""
        return self.stream is self._control

    @property
    def frames_received(self) -> int:
        """Frames opened since the hop before became the one it is."""
        return self._receiver.frames_received

    def bytes_received(self) -> int:
        """Bytes of step frames, of one that is under way as well; asked for in a STATUS frame."""
        # A question must not look like movement to the one who asks.
        self._num_questions += self.is_control
        if self.stream is None:
            return 0
        return self.stream.bytes_received - self._num_questions * HEADER_BYTES

    def attach(self, stream: Stream, hello: PushHello) -> None:
        """Accept the upstream hop's stream.

        Raises:
            RemoteProtocolError: not the peer, edge or epoch the client named, or a second stream.
        """
        expected = (self.previous, self._edge, self._epoch)
        if (stream.remote, hello.edge, hello.epoch) != expected or self.stream is not None:
            raise RemoteProtocolError("a push stream that this session does not expect")
        self.stream = stream

    def start(self, secret: bytearray) -> None:
        """Open what the hop before has sealed with the first keys of the edge."""
        self._receiver.start(secret, self._epoch)

    def change(self, previous: str, epoch: int, secret: bytearray) -> None:
        """Take frames of another hop, epoch and keys from now on, and of this one no more."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.abort()
        self.previous, self._epoch = previous, epoch
        self._receiver.start(secret, epoch)
        # The rest of a step that is held in part comes from the new hop, from its beginning.
        self._receiver.expect_repeats(drops_step=bool(self._held))
        self._share.leave(self._num_held_bytes)
        self._held, self._num_held_bytes = [], 0

    def close(self) -> None:
        """Take nothing more: no frame, and no other stream."""
        self.stream, self._epoch, self._held = None, -1, []
        self._receiver.erase()

    async def take(self, stream: Stream, header: FrameHeader) -> Arrived | None:
        """Take the STEP frame whose header has come.

        None if there is nothing to compute for it yet, or not again.

        Raises:
            PlanetServeError: a frame that does not belong here, or a stream that broke inside it.
        """
        num_bytes = header.payload_bytes
        self._receiver.check(header)
        if not self._chunkable and header.num_chunks > 1:
            self._reserve(header.num_tokens + sum(len(chunk.hidden_TD) for chunk in self._held))
        self.last_frame_s = asyncio.get_running_loop().time()
        await self._share.enter(num_bytes, must=bool(self._held))
        is_kept = False
        try:
            if stream is not self.stream:  # replaced while this frame waited
                return None
            frame = await stream.receive(_PAYLOAD_TIMEOUT_S + num_bytes / _LEAST_BYTES_PER_S)
            self.last_frame_s = arrived_s = asyncio.get_running_loop().time()
            if stream is not self.stream:
                return None
            chunk = self._receiver.open(*frame)
            del frame
            if chunk is None:
                # Sent again by a hop that cannot know how far this one came; what it became has
                # left.
                return None
            is_kept = True
            if self._chunkable or chunk.num_chunks == 1:
                return Arrived((chunk,), chunk.table, chunk.hidden_TD, num_bytes, arrived_s)
            return self._hold(chunk, num_bytes, arrived_s)
        finally:
            if not is_kept:
                self._share.leave(num_bytes)

    def leave(self, arrived: Arrived) -> None:
        """What became of these frames has been sent on."""
        self._share.leave(arrived.num_bytes)

    def _hold(self, chunk: StepChunk, num_bytes: int, arrived_s: float) -> Arrived | None:
        """Keep a chunk until its step is whole."""
        # Rotary tables that depend on the longest position must see the whole step at once.
        self._held.append(chunk)
        self._num_held_bytes += num_bytes
        if len(self._held) < chunk.num_chunks:
            return None
        held, self._held = self._held, []
        num_bytes, self._num_held_bytes = self._num_held_bytes, 0
        whole = StepTable.merge([piece.table for piece in held])
        hidden_TD = torch.cat([piece.hidden_TD for piece in held])
        parts = hidden_TD.split([piece.table.num_tokens for piece in held])
        for piece, part_TD in zip(held, parts, strict=True):
            piece.hidden_TD = part_TD  # what it came in need not be kept
        return Arrived(held, whole, hidden_TD, num_bytes, arrived_s)
