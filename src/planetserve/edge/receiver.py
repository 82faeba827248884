"""The receiving end of an edge: sealed STEP frames in, checked chunks of steps out.

Every hop has one for the edge that enters it, a client one for the edge that comes back to it from
its last hop. Nothing here reads or waits.
"""

from __future__ import annotations

from typing import Protocol

import torch

from planetserve.crypto.channel import EdgeOpener
from planetserve.crypto.secrets import TAG_BYTES
from planetserve.edge.chunk import StepChunk
from planetserve.edge.observer import StepObserver
from planetserve.edge.step_order import StepOrder
from planetserve.errors import PlanetServeError, RemoteProtocolError
from planetserve.tensors import is_finite, tensor_from_payload, wire_dtype
from planetserve.types import BlockSpan, PeerId
from planetserve.wire.frame import Direction, FrameHeader
from planetserve.wire.step import StepTable, max_table_bytes, unpack_answer_head


class DueAnswer(Protocol):
    """The answer that a client waits for: one frame for each chunk that it has sent."""

    def table_of(self, header: FrameHeader) -> StepTable | None:
        """The table of the chunk that is due; None if this one has been answered before.

        Raises:
            RemoteProtocolError: neither of them.
        """
        ...


class StepReceiver:
    """Opens and checks the STEP frames of one session. `start` before `open`.

    Args:
        session_id: of the session.
        edge: the edge that enters this peer; `ANSWER_EDGE` at a client.
        hidden_size: width of the hidden states.
        dtype: of the hidden states.
        num_rows: rows of the session.
        span: the blocks of a hop.
        first_step: number of the first step that a hop answers or passes on.
        observer: is told of every chunk that has been opened and accepted.
    """

    def __init__(
        self,
        session_id: bytes,
        edge: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        num_rows: int,
        span: BlockSpan | None = None,
        first_step: int = 0,
        observer: StepObserver | None = None,
    ):
        self.frames_received = 0
        """Frames opened with the edge's present keys."""
        self._session_id = session_id
        self._edge = edge
        self._hidden_size = hidden_size
        self._wire_dtype = wire_dtype(dtype)
        self._num_rows = num_rows
        self._span = (0, 0) if span is None else (span.start, span.end)
        self._order = StepOrder(first_step)
        self._opener: EdgeOpener | None = None
        self._observer = observer

    def start(self, secret: bytearray, epoch: int) -> None:
        """Open what a new sender seals; `secret` is not kept."""
        self.erase()
        self._opener = EdgeOpener(secret, self._session_id, self._edge, epoch, Direction.FORWARD)
        self.frames_received = 0

    def expect_repeats(self, *, drops_step: bool) -> None:
        """The new sender of a hop sends again what it cannot know to be here.

        `drops_step`: what was here of the last step has been thrown away.
        """
        self._order.repeat(drops_step=drops_step)

    def erase(self) -> None:
        """Drop the keys. Idempotent; nothing can be opened before the next `start`."""
        if self._opener is not None:
            self._opener.erase()
            self._opener = None

    def check(self, header: FrameHeader) -> None:
        """Refuse a frame to a hop whose payload must not be read.

        Raises:
            RemoteProtocolError: for other blocks, of another shape or dtype, or too long.
        """
        num_tokens = header.num_tokens
        if (header.span_start, header.span_end) != self._span:
            raise RemoteProtocolError("a step frame for other blocks")
        shape = (num_tokens, self._hidden_size)
        if header.shape != shape or header.dtype is not self._wire_dtype:
            raise RemoteProtocolError("a step tensor of the wrong shape or dtype")
        most = max_table_bytes(self._num_rows, num_tokens, self._max_loads)
        most += num_tokens * self._hidden_size * self._wire_dtype.itemsize + TAG_BYTES
        if header.payload_bytes > most:
            raise RemoteProtocolError("a step frame with more in it than its tokens")

    def open(
        self,
        header: FrameHeader,
        payload: bytearray,
        due: DueAnswer | None = None,
        sender: PeerId | None = None,
    ) -> StepChunk | None:
        """The chunk that a frame carries, or None if it was here before.

        Args:
            header: of a frame that `check` has passed, at a hop.
            payload: as it came.
            due: what a client waits for; None at a hop.
            sender: named by errors about what it makes itself. Which step a frame belongs to, it
                may only pass on.

        Raises:
            DecryptionFailed: not the next frame that was sealed for this edge.
            RemoteProtocolError: another step or chunk than is due, or anything else that is wrong.
        """
        table: StepTable | None = None
        try:
            if self._opener is None:
                raise RemoteProtocolError("a step frame before its keys")
            plaintext = self._opener.open(header, payload)
            self.frames_received += 1
            if due is None:
                table, offset = self._read_table(header, plaintext)
                loads = table.loads
            else:
                loads, offset = unpack_answer_head(plaintext)
            hidden_TD = tensor_from_payload(plaintext, offset, header.dtype, header.shape)
            if due is not None:
                self._check_answer(header, hidden_TD)
        except PlanetServeError as error:
            error.peer_id = sender
            raise
        if due is not None:
            table = due.table_of(header)
        elif table is not None and not self._order.is_new(header, table):
            return None
        if table is None:
            return None
        chunk = StepChunk(
            header.step, header.chunk, header.num_chunks, header.flags, table, hidden_TD, loads
        )
        if self._observer is not None:
            self._observer(chunk, memoryview(plaintext)[offset:])
        return chunk

    def _read_table(self, header: FrameHeader, plaintext: bytearray) -> tuple[StepTable, int]:
        table, offset = StepTable.unpack(plaintext, self._num_rows, header.num_tokens)
        if header.position != table.rows[0].start:
            raise RemoteProtocolError("a step frame whose position is not its first row's")
        if len(table.loads) > self._max_loads:
            raise RemoteProtocolError("a step frame with the loads of more hops than there are")
        return table, offset

    @property
    def _max_loads(self) -> int:
        # Every hop before this one runs a block at least, and adds one load.
        return self._span[0]

    def _check_answer(self, header: FrameHeader, hidden_TD: torch.Tensor) -> None:
        if header.dtype is not self._wire_dtype:
            raise RemoteProtocolError("the last hop answered in another dtype")
        if header.shape[1:] != (self._hidden_size,):
            raise RemoteProtocolError("the last hop answered tensors of another width")
        # At a hop, the engine thread sees to that.
        if not is_finite(hidden_TD):
            raise RemoteProtocolError("the last hop answered numbers that are not finite")
