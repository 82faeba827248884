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

from planetserve.edge.chunk import StepChunk
from planetserve.edge.replay_buffer import ReplayBuffer
from planetserve.edge.sender import StepSender
from planetserve.errors import PlanetServeError, StreamClosed, TransportError
from planetserve.server.next_hop_dials import Dials
from planetserve.swarm.network import Stream
from planetserve.wire.frame import ANSWER_EDGE, FLAG_REPLAY, FrameHeader, FrameType
from planetserve.wire.messages import NextHop, OpenSession, PushHello, Rewire
from planetserve.wire.protocols import PUSH_PROTOCOL
from planetserve.wire.step import HopLoad

Report = Callable[[PlanetServeError, int], Coroutine[Any, Any, None]]
"""Takes the error, which names the next hop, and the epoch of the edge to it."""
Fail = Callable[[Exception], None]


class Downstream:
    """The sending side of one session at one hop.

    Args:
        dials: makes connections to next hops.
        message: its OPEN.
        control: the client's stream, where the last hop answers.
        sender: this end of the edge.
        replay_buffer: what has been sent on, None at the last hop.
        load_ms: the present time of a decode step in one block, which the client is told.
        report: tells the client that the next hop is lost.
        fail: ends the session, when something else goes wrong here.
    """

    def __init__(
        self,
        dials: Dials,
        message: OpenSession,
        control: Stream,
        sender: StepSender,
        replay_buffer: ReplayBuffer | None,
        load_ms: Callable[[], float],
        report: Report,
        fail: Fail,
    ):
        self._dials = dials
        self._message = message
        self._control = control
        self._sender = sender
        self._replay_buffer = replay_buffer
        self._load_ms = load_ms
        self._report = report
        self._fail = fail
        self._next = message.next
        self._target: Stream | None = control if message.next is None else None
        self._lock = asyncio.Lock()
        self._connecting: asyncio.Task[None] | None = None

    @property
    def frames_sent(self) -> int:
        """Frames sealed for the current next hop in the current epoch."""
        return self._sender.frames_sent

    def start(self, secret: bytearray) -> None:
        """Begin to connect to the next hop; outputs wait for it."""
        self._start_sender(secret, self._message.epoch)
        if self._next is not None:
            self._connecting = asyncio.create_task(self._fill(self._next, None))

    async def push(self, arrived: StepChunk, output_TD: torch.Tensor) -> None:
        """Send on what became of one chunk.

        Args:
            arrived: the chunk that brought the inputs.
            output_TD: `[num_tokens, hidden]` outputs of this hop's blocks.

        Raises:
            StreamClosed: the client has gone.
        """
        chunk = arrived.with_hidden(output_TD.to(self._sender.dtype))
        async with self._lock:
            target, failure = self._target, None
            try:
                if target is not None and self._is_wanted(chunk):
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

    def _is_wanted(self, chunk: StepChunk) -> bool:
        """Whether the next hop lacks what became of this chunk."""
        is_replay = chunk.flags & FLAG_REPLAY
        return not is_replay or (self._next is not None and self._next.fresh)

    def rewire(self, message: Rewire, secret: bytearray) -> None:
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
        self._next = following
        self._start_sender(secret, message.epoch)
        self._connecting = asyncio.create_task(self._fill(following, message))

    async def close(self) -> None:
        """Stop sending and drop the keys. The client's stream stays open."""
        self._sender.erase()
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
                try:
                    for chunk in self._lacking(message):
                        await self._send(target, chunk)
                except StreamClosed as error:
                    await self._lost(target, error)
        except Exception as error:  # noqa: BLE001 - the session reports it, whatever it is
            self._fail(error)

    def _lacking(self, message: Rewire | None) -> list[StepChunk]:
        """What a next hop lacks; the first one, what there was before it was connected."""
        if self._replay_buffer is None:
            return []
        if message is None:
            return self._replay_buffer.recent()
        return self._replay_buffer.chunks(message.first_step, message.max_chunk_tokens)

    async def _connect(self, following: NextHop) -> Stream:
        client, session_id = self._control.remote, self._sender.session_id
        hello = PushHello(client=client, edge=following.edge, epoch=self._sender.epoch)
        header = FrameHeader(
            FrameType.HELLO, session=session_id, edge=hello.edge, epoch=hello.epoch
        )
        stream = await self._dials.open(client, following, PUSH_PROTOCOL)
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
            await self._report(error, self._sender.epoch)

    def _drop_target(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.abort()

    def _start_sender(self, secret: bytearray, epoch: int) -> None:
        following, end = self._next, self._message.end
        edge, next_end = (ANSWER_EDGE, 0) if following is None else (following.edge, following.end)
        now_s = asyncio.get_running_loop().time()
        self._sender.start(secret, edge, epoch, (end, next_end), now_s)

    async def _send(self, target: Stream, chunk: StepChunk) -> None:
        if self._target is not target:
            raise StreamClosed("this hop has another next one now")
        load = HopLoad.of(self._message.edge, self._load_ms())
        frame = self._sender.seal(chunk, asyncio.get_running_loop().time(), load)
        await target.send(*frame)
