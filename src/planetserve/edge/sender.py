"""The sending end of an edge: chunks of steps in, sealed STEP frames out.

A client has one for the edge to its first hop, every hop one for the edge that leaves it. Nothing
here waits or sends: the frames go to a stream in the order in which they were sealed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from planetserve.crypto.channel import EdgeSealer, Sealer
from planetserve.edge.chunk import StepChunk
from planetserve.edge.observer import StepObserver
from planetserve.errors import StreamClosed
from planetserve.tensors import tensor_bytes, wire_dtype
from planetserve.wire.frame import ANSWER_EDGE, FLAG_KEEP_LAST, Direction, FrameHeader, FrameType
from planetserve.wire.step import MAX_LOADS, HopLoad, pack_answer_head

NewSealer = Callable[[bytearray, bytes, int, int, Direction, float], Sealer]


class StepSender:
    """Seals the STEP frames of one session for whoever is next. `start` before `seal`.

    Args:
        session_id: of the session.
        dtype: of the hidden states that are sealed.
        new_sealer: makes what encrypts; the arguments are those of `EdgeSealer`.
        observer: is told of every chunk that has been sealed.
    """

    def __init__(
        self,
        session_id: bytes,
        dtype: torch.dtype,
        *,
        new_sealer: NewSealer = EdgeSealer,
        observer: StepObserver | None = None,
    ):
        self.session_id = session_id
        self.dtype = dtype
        self.epoch = 0
        """Of the edge's present keys."""
        self.frames_sent = 0
        """Frames sealed with the edge's present keys."""
        self._wire_dtype = wire_dtype(dtype)
        self._new_sealer = new_sealer
        self._sealer: Sealer | None = None
        self._edge = 0
        self._span = (0, 0)
        self.observer = observer

    def start(
        self, secret: bytearray, edge: int, epoch: int, span: tuple[int, int], now_s: float
    ) -> None:
        """Seal for a new receiver.

        Args:
            secret: of the edge; not kept.
            edge: the edge that enters the receiver.
            epoch: of its keys.
            span: the receiver's first block and the one after its last; 0 for the client.
            now_s: monotonic time.
        """
        self.erase()
        self._sealer = self._new_sealer(
            secret, self.session_id, edge, epoch, Direction.FORWARD, now_s
        )
        self._edge, self._span, self.epoch = edge, span, epoch
        self.frames_sent = 0

    def seal(
        self, chunk: StepChunk, now_s: float, load: HopLoad | None = None
    ) -> tuple[FrameHeader, bytes]:
        """The frame of a chunk.

        Args:
            chunk: with hidden states of this sender's dtype.
            now_s: monotonic time.
            load: what the hop that sends it says of its own load.

        Raises:
            StreamClosed: there are no keys yet.
            RekeyNeeded: the edge's keys are used up.
            LocalProtocolError: a number does not fit its field, or the keys have been erased.
        """
        if self._sealer is None:
            raise StreamClosed("an edge without keys")
        table, hidden_TD, loads = chunk.table, chunk.hidden_TD, chunk.loads
        if load is not None:
            loads = (*loads, load)[:MAX_LOADS]
        shape = tuple(hidden_TD.shape)
        num_tokens = shape[0]
        if self._edge != ANSWER_EDGE:
            head = (table.with_loads(loads) if loads else table).pack()
        else:
            head = pack_answer_head(loads)
            if chunk.flags & FLAG_KEEP_LAST and not table.is_decode:
                hidden_TD = hidden_TD[table.last_tokens()]
                shape = tuple(hidden_TD.shape)
        header = FrameHeader(
            FrameType.STEP,
            session=self.session_id,
            edge=self._edge,
            epoch=self.epoch,
            step=chunk.step,
            position=table.rows[0].start,
            num_tokens=num_tokens,
            span_start=self._span[0],
            span_end=self._span[1],
            dtype=self._wire_dtype,
            shape=shape,
            chunk=chunk.chunk,
            num_chunks=chunk.num_chunks,
            flags=chunk.flags,
        )
        tensor = tensor_bytes(hidden_TD)
        frame = self._sealer.seal(header, [head, tensor], now_s)
        self.frames_sent += 1
        if self.observer is not None:
            self.observer(chunk, tensor)
        return frame

    def erase(self) -> None:
        """Drop the keys. Idempotent; nothing can be sealed before the next `start`."""
        if self._sealer is not None:
            self._sealer.erase()
