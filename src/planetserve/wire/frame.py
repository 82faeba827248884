"""The one frame that crosses a peer boundary: a fixed header, then a payload of known length.

Sans-I/O: bytes in, values out. A reader first takes `HEADER_BYTES`, calls `FrameHeader.unpack`,
which checks every field and the payload cap *before* anything is allocated, then reads exactly
`payload_bytes`. Control frames carry strict JSON (`wire/messages.py`), STEP frames carry a row
table and one raw tensor (`wire/step.py`).

The header is fixed-size and complete on purpose: it is the associated data of an encrypted payload
and what a receipt commits to.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass, field

from planetserve.errors import LocalProtocolError, RemoteProtocolError, UnsupportedError
from planetserve.wire.protocols import OLDEST_VERSION, PROTOCOL_VERSION

MAX_CONTROL_BYTES = 64 * 1024
MAX_STEP_BYTES = 8 * 1024 * 1024
MAX_DIMS = 4
SESSION_BYTES = 16

_HEADER = struct.Struct(">BBH16sHBBIQIIIHHBBBB4IHHI")
_FLAGS = 3
HEADER_BYTES = _HEADER.size


class FrameType(enum.IntEnum):
    """What a frame carries."""

    OPEN = 1
    OPENED = 2
    HELLO = 3
    STEP = 4
    ERROR = 5
    CLOSE = 6
    PING = 7
    PONG = 8
    LEAVING = 9
    EDGE_KEYS = 10
    REWIRE = 11
    REWIRED = 12
    NEXT_HOP_LOST = 13
    STATUS = 14
    RECEIPT = 15


FLAG_KEEP_LAST = 1
"""On a STEP frame: the client needs only the last token of each row slice back."""
FLAG_REPLAY = 2
"""On a STEP frame: fills the KV cache of a hop that has just joined; nothing is answered."""

ANSWER_EDGE = 0xFFFF
"""The edge that enters the client."""
MAX_EDGE = 1023
"""Largest number of an edge that enters a hop."""


class Direction(enum.IntEnum):
    """Which way along the ring a frame travels."""

    FORWARD = 0
    BACKWARD = 1


class WireDtype(enum.IntEnum):
    """Element types a STEP payload may have, with their width in bytes."""

    NONE = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3

    @property
    def itemsize(self) -> int:
        return _ITEMSIZES[self]


_ITEMSIZES = {
    WireDtype.NONE: 0, WireDtype.FLOAT32: 4, WireDtype.FLOAT16: 2, WireDtype.BFLOAT16: 2
}  # fmt: skip
# Calling an enum takes five times as long as looking a member up.
_TYPES = {int(kind): kind for kind in FrameType}
_DTYPES = {int(dtype): dtype for dtype in WireDtype}
_DIRECTIONS = {int(direction): direction for direction in Direction}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """Everything about a frame but its payload. Integers are unsigned and bounded by their width.

    `edge` names an edge of the ring by the hop it enters, whose number no other hop of the session
    ever has; `ANSWER_EDGE` enters the client. `sequence` is the next number of its (edge,
    direction, epoch). `step` numbers the client's steps, `chunk` of
    `num_chunks` the pieces of one step, `position` is the first row's start in its KV cache,
    `num_tokens` the tokens of all rows together.
    """

    type: FrameType
    session: bytes = bytes(SESSION_BYTES)
    edge: int = 0
    direction: Direction = Direction.FORWARD
    epoch: int = 0
    sequence: int = 0
    step: int = 0
    position: int = 0
    num_tokens: int = 0
    span_start: int = 0
    span_end: int = 0
    dtype: WireDtype = WireDtype.NONE
    codec: int = 0
    shape: tuple[int, ...] = ()
    chunk: int = 0
    num_chunks: int = 1
    payload_bytes: int = 0
    flags: int = 0
    _packed: bytes = field(default=b"", init=False, repr=False, compare=False)
    """The header's bytes once they are known: a frame is packed to be sealed and to be sent."""

    def numbered(self, sequence: int, payload_bytes: int) -> FrameHeader:
        """The same header with these two fields filled in."""
        # `dataclasses.replace` takes three times as long, as long as encrypting 16 KiB.
        return FrameHeader(
            self.type, self.session, self.edge, self.direction, self.epoch, sequence, self.step,
            self.position, self.num_tokens, self.span_start, self.span_end, self.dtype, self.codec,
            self.shape, self.chunk, self.num_chunks, payload_bytes, self.flags,
        )  # fmt: skip

    def pack(self) -> bytes:
        """The header's `HEADER_BYTES` bytes.

        Raises:
            LocalProtocolError: a field does not fit its width or the payload passes its cap.
        """
        if self._packed:
            return self._packed
        if self.payload_bytes > payload_cap(self.type):
            raise LocalProtocolError(
                f"{self.type.name} payload of {self.payload_bytes} bytes is over the cap of "
                f"{payload_cap(self.type)}"
            )
        if len(self.shape) > MAX_DIMS:
            raise LocalProtocolError(f"a tensor of {len(self.shape)} dimensions cannot be sent")
        if len(self.session) != SESSION_BYTES:
            raise LocalProtocolError(f"a session id has {SESSION_BYTES} bytes")
        shape = self.shape + (0,) * (MAX_DIMS - len(self.shape))
        try:
            packed = _HEADER.pack(
                PROTOCOL_VERSION, self.type, self.flags, self.session, self.edge, self.direction, 0,
                self.epoch, self.sequence, self.step, self.position, self.num_tokens,
                self.span_start, self.span_end, self.dtype, self.codec, len(self.shape), 0,
                *shape, self.chunk, self.num_chunks, self.payload_bytes,
            )  # fmt: skip
        except struct.error as error:
            raise LocalProtocolError(f"a frame field is out of range: {error}") from error
        object.__setattr__(self, "_packed", packed)
        return packed

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> FrameHeader:
        """Parse and check a header.

        Raises:
            UnsupportedError: a version that this node does not speak.
            RemoteProtocolError: wrong length, type, dtype, shape, chunk or payload size.
        """
        if len(data) != HEADER_BYTES:
            raise RemoteProtocolError(f"a frame header has {HEADER_BYTES} bytes, got {len(data)}")
        (
            version, kind, flags, session, edge, direction, zero1, epoch, sequence, step, position,
            num_tokens, span_start, span_end, dtype, codec, num_dims, zero2,
            dim0, dim1, dim2, dim3, chunk, num_chunks, payload_bytes,
        ) = _HEADER.unpack(data)  # fmt: skip
        if not OLDEST_VERSION <= version <= PROTOCOL_VERSION:
            raise UnsupportedError(f"frame version {version}, this node speaks {PROTOCOL_VERSION}")
        try:
            frame_type, wire_dtype = _TYPES[kind], _DTYPES[dtype]
            way = _DIRECTIONS[direction]
        except KeyError as error:
            raise RemoteProtocolError(
                f"bad frame header: unknown type {kind}, dtype {dtype} or direction {direction}"
            ) from error
        if num_dims > MAX_DIMS or zero1 or zero2 or codec or flags & ~_FLAGS:
            raise RemoteProtocolError("bad frame header: dimensions, codec, flags or padding")
        if chunk >= num_chunks:
            raise RemoteProtocolError(f"bad frame header: chunk {chunk} of {num_chunks}")
        if payload_bytes > payload_cap(frame_type):
            raise RemoteProtocolError(
                f"{frame_type.name} payload of {payload_bytes} bytes is over the cap"
            )
        dims = (dim0, dim1, dim2, dim3)
        shape = dims[:num_dims]
        if any(dims[num_dims:]):
            # What is accepted packs to the same bytes again: they are what a seal covers.
            raise RemoteProtocolError("bad frame header: the length of an absent dimension")
        if math.prod(shape) * wire_dtype.itemsize > payload_bytes and shape:
            raise RemoteProtocolError("bad frame header: the tensor is longer than the payload")
        header = cls(
            frame_type, session, edge, way, epoch, sequence, step, position, num_tokens,
            span_start, span_end, wire_dtype, codec, shape, chunk, num_chunks, payload_bytes, flags,
        )  # fmt: skip
        # What is accepted packs to the same bytes again.
        object.__setattr__(header, "_packed", bytes(data))
        return header


def payload_cap(kind: FrameType) -> int:
    """Largest payload a frame of this type may have, in bytes."""
    return MAX_STEP_BYTES if kind is FrameType.STEP else MAX_CONTROL_BYTES
