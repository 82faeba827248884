"""The client's own two ends of a ring: what it seals for the first hop and opens from the last.

`RingStep` is a step on its way around: its chunks, and what has come back of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from planetserve.client.ring.hop_connection import HopConnection
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.crypto.channel import EdgeOpener, EdgeSealer, Opener, Sealer
from planetserve.errors import PlanetServeError, RemoteProtocolError, StreamClosed
from planetserve.tensors import is_finite, tensor_bytes, tensor_from_payload, wire_dtype
from planetserve.types import PeerId
from planetserve.wire.frame import ANSWER_EDGE, Direction, FrameHeader, FrameType
from planetserve.wire.step import HopLoad, StepTable, unpack_answer_head

_LAST_WORDS_TIMEOUT_S = 0.2


@dataclass(slots=True)
class RingStep:
    """A step under way: its chunks, and what has come back of it."""

    number: int
    tables: tuple[StepTable, ...]
    hidden_TD: torch.Tensor
    keep_last: bool
    output_TD: torch.Tensor | None = None
    num_answered: int = 0
    offset: int = 0
    room: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, chunk_TD: torch.Tensor) -> None:
        """Put the next chunk's outputs in their place."""
        piece = self.tables[self.num_answered]
        if len(self.tables) == 1 and len(chunk_TD) == piece.num_tokens:
            self.output_TD = chunk_TD  # a decode step
        else:
            self._put(piece, chunk_TD)
        self.offset += piece.num_tokens
        self.num_answered += 1
        self.room.set()

    def _put(self, piece: StepTable, chunk_TD: torch.Tensor) -> None:
        if self.output_TD is None:
            self.output_TD = torch.zeros_like(self.hidden_TD)
        if self.keep_last:
            self.output_TD[[self.offset + end for end in piece.last_tokens()]] = chunk_TD
        else:
            self.output_TD[self.offset : self.offset + piece.num_tokens] = chunk_TD


class RingEnds:
    """Keys and counters of the edge that leaves the client and of the one that comes back."""

    sealer_type: ClassVar[Callable[..., Sealer]] = EdgeSealer
    opener_type: ClassVar[Callable[..., Opener]] = EdgeOpener

    def __init__(self, session_id: bytes, spec: RingSpec):
        self._session_id = session_id
        self._spec = spec
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None
        self._epoch = 0
        self._num_sent = 0
        self._num_received = 0

    def frames(self) -> tuple[int, int]:
        """Frames sent and received, each since its edge has its present keys."""
        return self._num_sent, self._num_received

    def start_sending(self, secret: bytearray, edge: int, epoch: int) -> None:
        """Seal for a new first hop, which `edge` enters."""
        if self._sealer is not None:
            self._sealer.erase()
        self._sealer = self.sealer_type(
            secret, self._session_id, edge, epoch, Direction.FORWARD, _now_s()
        )
        self._epoch, self._num_sent = epoch, 0

    def start_receiving(self, secret: bytearray, epoch: int) -> None:
        """Open what a new last hop seals."""
        if self._opener is not None:
            self._opener.erase()
        self._opener = self.opener_type(
            secret, self._session_id, ANSWER_EDGE, epoch, Direction.FORWARD
        )
        self._num_received = 0

    def erase(self) -> None:
        """Drop the keys."""
        for end in (self._sealer, self._opener):
            if end is not None:
                end.erase()

    async def send(
        self,
        first: HopConnection,
        table: StepTable,
        hidden_TD: torch.Tensor,
        *,
        step: int,
        chunk: int,
        num_chunks: int,
        flags: int,
    ) -> None:
        """Send one chunk of a step to the first hop.

        Raises:
            StreamClosed: the hop has gone without saying why; `peer_id` names it.
        """
        if self._sealer is None:
            raise StreamClosed("this ring is not open")
        dtype = self._spec.dtype
        header = FrameHeader(
            FrameType.STEP,
            session=self._session_id,
            edge=first.edge,
            epoch=self._epoch,
            step=step,
            position=table.rows[0].start,
            num_tokens=table.num_tokens,
            span_start=first.hop.start,
            span_end=first.hop.end,
            dtype=wire_dtype(dtype),
            shape=(table.num_tokens, self._spec.hidden_size),
            chunk=chunk,
            num_chunks=num_chunks,
            flags=flags,
        )
        parts: list[bytes | memoryview] = [table.pack(), tensor_bytes(hidden_TD)]
        header, sealed = self._sealer.seal(header, parts, _now_s())
        self._num_sent += 1
        try:
            await first.stream.send(header, sealed)
        except StreamClosed as error:
            # What the hop said before it closed the stream tells more: it goes to the inbox.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                    await first.ended.wait()
                    return
            error.peer_id = first.peer_id
            raise

    def open(
        self, step: RingStep, header: FrameHeader, payload: bytearray, last: PeerId
    ) -> tuple[torch.Tensor, tuple[HopLoad, ...]] | None:
        """The next chunk's outputs and what the hops say of their loads.

        None for a chunk that has been answered before, by a hop that was replaced since.

        Raises:
            PlanetServeError: anything but the answer that is due. `peer_id` is `last`, the last
                hop, if no other one can be at fault; which step an answer belongs to and how many
                tokens it has is what came to the last hop, and that is any hop's fault.
        """
        if self._opener is None:
            raise RemoteProtocolError("an answer before its keys")
        try:
            plaintext = self._opener.open(header, payload)
            self._num_received += 1
            if (header.step, header.chunk) < (step.number, step.num_answered):
                return None
            if header.dtype is not wire_dtype(self._spec.dtype):
                raise RemoteProtocolError("the last hop answered in another dtype")
            loads, offset = unpack_answer_head(plaintext)
            chunk_TD = tensor_from_payload(plaintext, offset, header.dtype, header.shape)
            if chunk_TD.shape[1:] != (self._spec.hidden_size,):
                raise RemoteProtocolError("the last hop answered tensors of another width")
            if not is_finite(chunk_TD):
                raise RemoteProtocolError("the last hop answered numbers that are not finite")
        except PlanetServeError as error:
            error.peer_id = last
            raise
        return self._wanted(step, header, chunk_TD), loads

    def _wanted(self, step: RingStep, header: FrameHeader, chunk_TD: torch.Tensor) -> torch.Tensor:
        """The tokens that were asked for.

        Raises:
            RemoteProtocolError: they are not there.
        """
        table = step.tables[step.num_answered]
        if (header.step, header.chunk) != (step.number, step.num_answered):
            raise RemoteProtocolError("the chain answered another step than was asked")
        if not step.keep_last and len(chunk_TD) == table.num_tokens:
            return chunk_TD
        if step.keep_last and len(chunk_TD) == len(table.rows):
            return chunk_TD
        if step.keep_last and len(chunk_TD) == table.num_tokens:
            return chunk_TD[table.last_tokens()]  # on the way, a hop has asked for all of them
        raise RemoteProtocolError("the chain answered for other tokens than was asked")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
