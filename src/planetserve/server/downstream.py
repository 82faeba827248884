"""Sends a hop's outputs to the next hop or the client, or keeps them until there is one.

A lost next hop does not end the session: outputs go on into the replay buffer, the client is told,
and when it names another hop (`rewire`), that hop first gets what the replay buffer holds, then
what comes. Outputs and replays leave under one lock, so in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from planetserve.crypto.channel import Sealer
from planetserve.errors import PlanetServeError, StreamClosed, TransportError
from planetserve.server.next_hop_dials import Dials
from planetserve.server.replay_buffer import ReplayBuffer, SentChunk
from planetserve.swarm.network import Stream
from planetserve.tensors import named_dtype, tensor_bytes, wire_dtype
from planetserve.wire.frame import (
    ANSWER_EDGE,
    FLAG_KEEP_LAST,
    FLAG_REPLAY,
    FrameHeader,
    FrameType,
)
from planetserve.wire.messages import NextHop, OpenSession, PushHello, Rewire
from planetserve.wire.protocols import PUSH_PROTOCOL
from planetserve.wire.step import (
    MAX_LOADS,
    HopLoad,
    StepTable,
    max_frame_tokens,
    pack_answer_head,
)

Report = Callable[[PlanetServeError], Coroutine[Any, Any, None]]
Fail = Callable[[Exception], None]


class Downstream:
    """The sending side of one session at one hop.

    Args:
        dials: makes connections to next hops.
        session_id: of the session.
        message: its OPEN.
        control: the client's stream, where the last hop answers.
        replay buffer: what has been sent on, None at the last hop.
        load_ms: the present time of a decode step in one block, which the client is told.
        report: tells the client that the next hop is lost.
        fail: ends the session, when something else goes wrong here.
    """

    def __init__(
        self,
        dials: Dials,
        session_id: bytes,
        message: OpenSession,
        control: Stream,
        replay_buffer: ReplayBuffer | None,
        load_ms: Callable[[], float],
        report: Report,
        fail: Fail,
    ):
        self._dials = dials
        self._session_id = session_id
        self._span_end = message.end
        self._control = control
        self._dtype = named_dtype(message.dtype)
        self._load_ms = load_ms
        self._own_edge = message.edge
        self._report = report
        self._fail = fail
        self._next = message.next
        self.epoch = message.epoch
        """Of the edge that leaves this hop."""
        self._replay_buffer = replay_buffer
        self._target: Stream | None = control if message.next is None else None
        self._sealer: Sealer | None = None
        self._lock = asyncio.Lock()
        self._connecting: asyncio.Task[None] | None = None
        self.frames_sent = 0
        """Frames sealed for the current next hop in the current epoch."""

    @property
    def edge(self) -> int:
        """The edge that leaves this hop."""
        return ANSWER_EDGE if self._next is None else self._next.edge

    def start(self, sealer: Sealer) -> None:
        """Begin to connect to the next hop; outputs wait for it."""
        self._sealer = sealer
        if self._next is not None:
            self._connecting = asyncio.create_task(self._fill(self._next, None))

    async def push(self, received: FrameHeader, table: StepTable, output_TD: torch.Tensor) -> None:
        """Send on what became of one frame.

        Args:
            received: the header of the frame that brought the inputs.
            table: its table.
            output_TD: `[num_tokens, hidden]` outputs of this hop's blocks.

        Raises:
            StreamClosed: the client has gone.
        """
        output_TD = output_TD.to(self._dtype)
        async with self._lock:
            chunk = SentChunk(received, table, output_TD)
            target, failure = self._target, None
            try:
                if target is not None and self._is_wanted(received):
                    await self._send(target, chunk)
            except StreamClosed as error:
                failure = error
            finally:
                # Not before: the next hop need not wait for it.
                if self._replay_buffer is not None:
                    self._replay_buffer.add(chunk)
            if target is None or failure is None:
                return
            if self._next is None:
                raise failure
            await self._lost(target, failure)

    def _is_wanted(self, received: FrameHeader) -> bool:
        """Whether the next hop lacks what became of this frame."""
        is_replay = received.flags & FLAG_REPLAY
        return not is_replay or (self._next is not None and self._next.fresh)

    def rewire(self, message: Rewire, sealer: Sealer) -> None:
        """Go on with another next hop, from now on; returns at once.

        What is being sent to the one before is cut short.
        """
        following = message.next
        if following is None or self._replay_buffer is None:
            raise ValueError("only a hop with a next one can get another")
        # Nothing is sealed with the old key any more, and whoever waits on the old stream wakes up.
        self._drop_target()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._sealer is not None:
            self._sealer.erase()
        self._next, self.epoch, self._sealer = following, message.epoch, sealer
        self.frames_sent = 0
        self._connecting = asyncio.create_task(self._fill(following, message))

    async def close(self) -> None:
        """Stop sending and drop the keys. The client's stream stays open."""
        if self._sealer is not None:
            self._sealer.erase()
        try:
            if self._connecting is not None:
                self._connecting.cancel()
                await asyncio.gather(self._connecting, return_exceptions=True)
            if self._target is not None and self._target is not self._control:
                await self._target.close()
        finally:
            # Also when this is cancelled meanwhile.
            if self._target is not self._control:
                self._drop_target()

    async def _fill(self, following: NextHop, message: Rewire | None) -> None:
        """Connect to the next hop and send it what it lacks."""
        try:
            async with self._lock:
                try:
                    target = self._target = await self._connect(following)
                except TransportError as error:
                    await self._park(error)
                    return
                chunks = [] if message is None else self._replayed(message)
                if self._replay_buffer is not None:
                    chunks += self._replay_buffer.recent()
                try:
                    for chunk in chunks:
                        await self._send(target, chunk)
                except StreamClosed as error:
                    await self._lost(target, error)
        except Exception as error:  # noqa: BLE001 - the session reports it, whatever it is
            self._fail(error)

    def _replayed(self, message: Rewire) -> list[SentChunk]:
        """What belongs to steps that are answered, as frames."""
        if self._replay_buffer is None:
            return []
        self._replay_buffer.settle(message.first_step)
        settled = self._replay_buffer.replay()
        if settled is None:
            return []
        table, hidden_TD = settled
        by_bytes = max_frame_tokens(hidden_TD.shape[1] * self._dtype.itemsize)
        pieces = table.split(max(1, min(message.max_chunk_tokens, by_bytes)))
        chunks, offset = [], 0
        for index, piece in enumerate(pieces):
            count = piece.num_tokens
            header = FrameHeader(
                FrameType.STEP,
                step=max(0, message.first_step - 1),
                position=piece.rows[0].start,
                num_tokens=count,
                chunk=index,
                num_chunks=len(pieces),
                flags=FLAG_REPLAY,
            )
            chunks.append(SentChunk(header, piece, hidden_TD[offset : offset + count]))
            offset += count
        return chunks

    async def _connect(self, following: NextHop) -> Stream:
        hello = PushHello(client=self._control.remote, edge=following.edge, epoch=self.epoch)
        header = FrameHeader(
            FrameType.HELLO, session=self._session_id, edge=hello.edge, epoch=hello.epoch
        )
        stream = await self._dials.open(self._control.remote, following, PUSH_PROTOCOL)
        try:
            await stream.send(header, hello.encode())
        except BaseException:
            stream.abort()
            raise
        return stream

    async def _lost(self, target: Stream, error: PlanetServeError) -> None:
        # A stream that `rewire` has closed is no news.
        if self._target is target:
            await self._park(error)

    async def _park(self, error: PlanetServeError) -> None:
        """Go on without a next hop, and tell the client."""
        self._drop_target()
        error.peer_id = self._next.peer_id if self._next else None
        with contextlib.suppress(PlanetServeError, TimeoutError):
            await self._report(error)

    def _drop_target(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.abort()

    async def _send(self, target: Stream, chunk: SentChunk) -> None:
        sealer, following = self._sealer, self._next
        if sealer is None or self._target is not target:
            raise StreamClosed("this hop has another next one now")
        received, output_TD = chunk.header, chunk.hidden_TD
        keeps_last = following is None and received.flags & FLAG_KEEP_LAST
        if keeps_last and not chunk.table.is_decode:
            output_TD = output_TD[chunk.table.last_tokens()]
        header = FrameHeader(
            FrameType.STEP,
            session=self._session_id,
            edge=self.edge,
            epoch=self.epoch,
            step=received.step,
            position=received.position,
            num_tokens=received.num_tokens,
            span_start=self._span_end,
            span_end=0 if following is None else following.end,
            dtype=wire_dtype(self._dtype),
            shape=tuple(output_TD.shape),
            chunk=received.chunk,
            num_chunks=received.num_chunks,
            flags=received.flags,
        )
        loads = (*chunk.table.loads, HopLoad.of(self._own_edge, self._load_ms()))[:MAX_LOADS]
        if following is None:
            head = pack_answer_head(loads)
        else:
            head = chunk.table.with_loads(loads).pack()
        parts: list[bytes | memoryview] = [head, tensor_bytes(output_TD)]
        header, sealed = sealer.seal(header, parts, asyncio.get_running_loop().time())
        self.frames_sent += 1
        await target.send(header, sealed)
