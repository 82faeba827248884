"""Where a hop's inputs come from: whose frames count, what they may be, and what they become.

A frame is judged by its header, and admitted (`backpressure.py`) before its payload is read; then
it is opened, and its table and place in the order of steps checked (`step_order.py`). Chunks
of a step that the model must see whole are held here, within what the session has leased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planetserve.crypto.channel import Opener
from planetserve.crypto.secrets import TAG_BYTES
from planetserve.errors import RemoteProtocolError
from planetserve.server.backpressure import PeerBackpressure
from planetserve.server.step_order import StepOrder
from planetserve.swarm.network import Stream
from planetserve.tensors import named_dtype, tensor_from_payload, wire_dtype
from planetserve.types import CLIENT
from planetserve.wire.frame import HEADER_BYTES, FrameHeader
from planetserve.wire.messages import OpenSession, PushHello
from planetserve.wire.step import StepTable, max_table_bytes

_PAYLOAD_TIMEOUT_S = 60.0
_LEAST_BYTES_PER_S = 64 * 1024
"""What is announced counts at the gate until it is here: slower than this it is given up."""

Reserve = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Arrived:
    """One engine step, and the frames that brought it."""

    chunks: Sequence[tuple[FrameHeader, StepTable]]
    table: StepTable
    hidden_TD: torch.Tensor
    arrived_s: float
    """When the last of the frames was here."""

    @property
    def num_bytes(self) -> int:
        """What these frames count for at the gate."""
        return sum(header.payload_bytes for header, _ in self.chunks)


class Upstream:
    """The receiving side of one session at one hop.

    Args:
        message: the session's OPEN.
        control: the client's stream, which brings the steps of a first hop.
        share: the session's part of the gate; closed by its owner.
        hidden_size: width of what travels.
        chunkable: whether the engine takes steps in parts.
        reserve: leases room for a step of so many tokens, or raises.
    """

    def __init__(
        self,
        message: OpenSession,
        control: Stream,
        share: PeerBackpressure,
        hidden_size: int,
        *,
        chunkable: bool,
        reserve: Reserve,
    ):
        self.stream: Stream | None = control if message.previous == CLIENT else None
        """What brings the steps, once it is here."""
        self.previous = message.previous
        self.frames_received = 0
        """Frames opened since the hop before became the one it is."""
        self.last_frame_s = 0.0
        """Monotonic time of the latest frame."""
        self._message = message
        self._control = control
        self._epoch = message.epoch
        self._share = share
        self._hidden_size = hidden_size
        self._dtype = wire_dtype(named_dtype(message.dtype))
        self._chunkable = chunkable
        self._reserve = reserve
        self._order = StepOrder(message.first_step)
        self._opener: Opener | None = None
        self._held: list[tuple[FrameHeader, StepTable, torch.Tensor]] = []
        self._num_held_tokens = 0
        self._num_questions = 0

    @property
    def is_control(self) -> bool:
        """Whether the client's own stream brings the steps."""
        return self.stream is self._control

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
        expected = (self.previous, self._message.edge, self._epoch)
        if (stream.remote, hello.edge, hello.epoch) != expected or self.stream is not None:
            raise RemoteProtocolError("a push stream that this session does not expect")
        self.stream = stream

    def change(self, previous: str, epoch: int) -> None:
        """Take frames of another hop and epoch from now on, and of this one no more."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.abort()
        self.previous, self._epoch = previous, epoch
        self.frames_received = 0
        # The rest of a step that is held in part comes from the new hop, from its beginning.
        self._order.repeat(drops_step=bool(self._held))
        self._share.leave(sum(header.payload_bytes for header, _, _ in self._held))
        self._held, self._num_held_tokens = [], 0

    def set_opener(self, opener: Opener | None) -> None:
        """Open frames with other keys from now on, or with none."""
        if self._opener is not None:
            self._opener.erase()
        self._opener = opener

    def close(self) -> None:
        """Take nothing more: no frame, and no other stream."""
        self.stream, self._epoch, self._held = None, -1, []
        self.set_opener(None)

    async def take(self, stream: Stream, header: FrameHeader) -> Arrived | None:
        """Take the STEP frame whose header has come.

        None if there is nothing to compute for it yet, or not again.

        Raises:
            PlanetServeError: a frame that does not belong here, or a stream that broke inside it.
        """
        num_bytes = header.payload_bytes
        self._check_size(header)
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
            table, hidden_TD = self._open(*frame)
            del frame
            self.frames_received += 1
            if not self._order.is_new(header, table):
                # Sent again by a hop that cannot know how far this one came; what it became has
                # left.
                return None
            is_kept = True
            if self._chunkable or header.num_chunks == 1:
                return Arrived([(header, table)], table, hidden_TD, arrived_s)
            return self._hold(header, table, hidden_TD, arrived_s)
        finally:
            if not is_kept:
                self._share.leave(num_bytes)

    def leave(self, arrived: Arrived) -> None:
        """What became of these frames has been sent on."""
        self._share.leave(arrived.num_bytes)

    def _check_size(self, header: FrameHeader) -> None:
        """Refuse what must not be read."""
        message, num_tokens = self._message, header.num_tokens
        if (header.span_start, header.span_end) != (message.start, message.end):
            raise RemoteProtocolError("a step frame for other blocks")
        shape = (num_tokens, self._hidden_size)
        if header.shape != shape or header.dtype is not self._dtype:
            raise RemoteProtocolError("a step tensor of the wrong shape or dtype")
        # Every hop before this one runs a block at least, and adds one load.
        most = max_table_bytes(message.num_rows, num_tokens, message.start)
        most += num_tokens * self._hidden_size * self._dtype.itemsize + TAG_BYTES
        if header.payload_bytes > most:
            raise RemoteProtocolError("a step frame with more in it than its tokens")
        if not self._chunkable and header.num_chunks > 1:
            self._reserve(self._num_held_tokens + num_tokens)

    def _open(self, header: FrameHeader, payload: bytearray) -> tuple[StepTable, torch.Tensor]:
        if self._opener is None:
            raise RemoteProtocolError("a step frame before its keys")
        plaintext = self._opener.open(header, payload)
        message = self._message
        table, offset = StepTable.unpack(plaintext, message.num_rows, header.num_tokens)
        if header.position != table.rows[0].start:
            raise RemoteProtocolError("a step frame whose position is not its first row's")
        if len(table.loads) > message.start:
            raise RemoteProtocolError("a step frame with the loads of more hops than there are")
        return table, tensor_from_payload(plaintext, offset, header.dtype, header.shape)

    def _hold(
        self, header: FrameHeader, table: StepTable, hidden_TD: torch.Tensor, arrived_s: float
    ) -> Arrived | None:
        """Keep a chunk until its step is whole."""
        # Rotary tables that depend on the longest position must see the whole step at once.
        self._held.append((header, table, hidden_TD))
        self._num_held_tokens += table.num_tokens
        if len(self._held) < header.num_chunks:
            return None
        held, self._held, self._num_held_tokens = self._held, [], 0
        chunks = [(head, piece) for head, piece, _ in held]
        whole = StepTable.merge([piece for _, piece, _ in held])
        return Arrived(chunks, whole, torch.cat([part for *_, part in held]), arrived_s)
