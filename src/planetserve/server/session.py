"""One session at one hop: frames in, engine steps, frames out, in order and bounded.

`ingest` takes STEP frames from the one peer that the session names and hands them to the engine;
`pump` waits for the engine's answers in the same order and pushes them to the next hop, or to the
client. The queue between them is bounded, so a slow consumer stops the reading of its own
producer and nobody else's. Any failure ends the session with one typed error to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from planetserve.crypto.channel import EdgeOpener, EdgeSealer, Opener, Sealer
from planetserve.crypto.secrets import ChannelSecret, open_deal, wipe
from planetserve.engine.engine import Engine
from planetserve.errors import (
    PlanetServeError,
    RemoteProtocolError,
    SessionClosed,
    StreamClosed,
)
from planetserve.server.gate import StepGate
from planetserve.swarm.node import SwarmNode
from planetserve.swarm.streams import FrameStream, open_stream
from planetserve.tensors import tensor_bytes, tensor_from_payload
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    Direction,
    FrameHeader,
    FrameType,
    WireDtype,
)
from planetserve.wire.messages import OpenSession, PushHello, error_reply
from planetserve.wire.protocols import PUSH_PROTOCOL
from planetserve.wire.step import StepTable

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 8
_UPSTREAM_GRACE_S = 0.5
_DEAL_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_LAST_WORDS_TIMEOUT_S = 1.0
_WIRE_DTYPES = {
    "float32": (WireDtype.FLOAT32, torch.float32),
    "float16": (WireDtype.FLOAT16, torch.float16),
    "bfloat16": (WireDtype.BFLOAT16, torch.bfloat16),
}


@dataclass(slots=True)
class _Pending:
    """One engine step and the frames that its output becomes."""

    chunks: Sequence[tuple[FrameHeader, StepTable]]
    output: asyncio.Future[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """What these frames count for at the gate."""
        return sum(header.payload_bytes for header, _ in self.chunks)


class ServerSession:
    """A session between its OPEN and its end.

    Activations are opened and sealed with keys of this session's two edges only.

    Args:
        gate: where step frames wait when too much is queued for the client already.
        control: the client's stream.
        channel: this hop's end of the handshake, through which the client deals edge secrets.
        max_step_tokens: largest step that is assembled when prefills cannot be chunked.
    """

    sealer_type: ClassVar[Callable[..., Sealer]] = EdgeSealer
    opener_type: ClassVar[Callable[..., Opener]] = EdgeOpener

    def __init__(
        self,
        node: SwarmNode,
        engine: Engine,
        gate: StepGate,
        session_id: bytes,
        message: OpenSession,
        control: FrameStream,
        channel: ChannelSecret,
        max_step_tokens: int,
    ):
        self.key = session_id + message.edge.to_bytes(2, "big")
        """Names the session in the engine; unique in this process."""
        self.session_id = session_id
        self.open = message
        self._node = node
        self._engine = engine
        self._gate = gate
        self._num_queued_bytes = 0
        self._control = control
        self._max_step_tokens = max_step_tokens
        self._dtype, self._torch_dtype = _WIRE_DTYPES[message.dtype]
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue(MAX_STEPS_IN_FLIGHT)
        self._held: list[tuple[FrameHeader, StepTable, torch.Tensor]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._attached = message.edge == 0
        self._channel = channel
        self._sealer: Sealer
        self._opener: Opener
        self._dealt = asyncio.Event()
        self.last_frame_s = 0.0
        """Monotonic time of the latest frame; the handler's idle check reads it."""

    async def run(self) -> PlanetServeError | None:
        """Serve until the client closes, something fails, or the task is cancelled.

        Returns:
            Why the session failed, of which the client is told in one ERROR frame; None if it
            just ended. Nothing is raised.
        """
        control = self.ingest(self._control) if self.open.edge == 0 else self._watch()
        tasks = [asyncio.create_task(control), asyncio.create_task(self._pump())]
        try:
            await asyncio.wait([*tasks, self._failure], return_when=asyncio.FIRST_COMPLETED)
            # What ended the session from outside comes first: the tasks fail because of it.
            finished = [task for task in (self._failure, *tasks) if task.done()]
            errors = [task.exception() for task in finished if not task.cancelled()]
            error = next((item for item in errors if item is not None), None)
        finally:
            for task in tasks:
                task.cancel()
            self._failure.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._erase()
            self._leave_gate(self._num_queued_bytes)
        return None if error is None else await self._report(error)

    def fail(self, error: PlanetServeError) -> None:
        """End the session with `error`, from any task."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def announce_leaving(self) -> None:
        """Ask the client to move; the session goes on here until it does."""
        header = FrameHeader(FrameType.LEAVING, session=self.session_id, edge=self.open.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self._control.send(header)

    def attach(self, remote: str, hello: PushHello) -> None:
        """Accept the upstream hop's stream.

        Raises:
            RemoteProtocolError: not the peer, edge or epoch the client named, or a second stream.
        """
        expected = (self.open.previous, self.open.edge, self.open.epoch)
        if (remote, hello.edge, hello.epoch) != expected or self._attached:
            raise RemoteProtocolError("a push stream that this session does not expect")
        self._attached = True

    async def ingest(self, stream: FrameStream) -> None:
        """Take STEP frames from `stream` until CLOSE or its end.

        Raises:
            PlanetServeError: a frame that does not belong here, or a step the engine refuses.
        """
        if stream is self._control:
            await self._take_deal()
        else:
            await self._dealt.wait()
        while True:
            try:
                header, payload = await stream.receive()
            except StreamClosed:
                if stream is self._control:
                    return
                # Closing a session reaches the hops in any order; only a session that lives on
                # without its upstream has failed.
                await asyncio.sleep(_UPSTREAM_GRACE_S)
                raise
            if header.type is FrameType.CLOSE and stream is self._control:
                return
            if header.type is not FrameType.STEP:
                raise RemoteProtocolError(f"unexpected {header.type.name} frame")
            self.last_frame_s = asyncio.get_running_loop().time()
            await self._enter_gate(len(payload))
            table, hidden_TD = self._read_step(header, payload)
            await self._submit(header, table, hidden_TD)

    def _read_step(self, header: FrameHeader, payload: bytearray) -> tuple[StepTable, torch.Tensor]:
        message = self.open
        plaintext = self._opener.open(header, payload)
        if (header.span_start, header.span_end) != (message.start, message.end):
            raise RemoteProtocolError("a step frame for other blocks")
        shape = (header.num_tokens, self._engine.runner.hidden_size)
        if header.shape != shape or header.dtype is not self._dtype:
            raise RemoteProtocolError("a step tensor of the wrong shape or dtype")
        table, offset = StepTable.unpack(plaintext, message.num_rows, header.num_tokens)
        if header.position != table.rows[0].start:
            raise RemoteProtocolError("a step frame whose position is not its first row's")
        return table, tensor_from_payload(plaintext, offset, header.dtype, header.shape)

    async def _submit(self, header: FrameHeader, table: StepTable, hidden_TD: torch.Tensor) -> None:
        if self._engine.runner.chunkable or header.num_chunks == 1:
            future = self._engine.submit(self.key, table, hidden_TD)
            await self._queue.put(_Pending([(header, table)], future))
            return
        # Rotary tables that depend on the longest position must see the whole step at once.
        self._held.append((header, table, hidden_TD))
        held_tokens = sum(piece.num_tokens for _, piece, _ in self._held)
        if header.chunk != len(self._held) - 1 or held_tokens > self._max_step_tokens:
            raise RemoteProtocolError("chunks out of order or too many")
        if header.chunk == header.num_chunks - 1:
            held, self._held = self._held, []
            whole = StepTable.merge([piece for _, piece, _ in held])
            future = self._engine.submit(self.key, whole, torch.cat([part for *_, part in held]))
            await self._queue.put(_Pending([(head, piece) for head, piece, _ in held], future))

    async def _watch(self) -> None:
        """Between the ends of the ring the client's stream deals, and says when to stop."""
        try:
            await self._take_deal()
            header, _ = await self._control.receive()
        except StreamClosed:
            return
        if header.type is not FrameType.CLOSE:
            raise RemoteProtocolError(f"unexpected {header.type.name} frame")

    async def _take_deal(self) -> None:
        """Receive the secrets of this hop's two edges; only then can a step be opened or sent."""
        header, payload = await self._control.receive(_DEAL_TIMEOUT_S)
        if header.type is not FrameType.DEAL:
            raise RemoteProtocolError(f"expected DEAL, got {header.type.name}")
        epoch, inbound, outbound = open_deal(self._channel, bytes(payload))
        try:
            edge, forward = self.open.edge, Direction.FORWARD
            if epoch != self.open.epoch:
                raise RemoteProtocolError("secrets for another epoch than was opened")
            now_s = asyncio.get_running_loop().time()
            self._opener = self.opener_type(inbound, self.session_id, edge, epoch, forward)
            self._sealer = self.sealer_type(
                outbound, self.session_id, edge + 1, epoch, forward, now_s
            )
        finally:
            wipe(inbound, outbound)
        self._dealt.set()

    async def _enter_gate(self, num_bytes: int) -> None:
        is_only, must = not self._num_queued_bytes, bool(self._held)
        await self._gate.enter(self._control.remote, num_bytes, is_only=is_only, must=must)
        self._num_queued_bytes += num_bytes

    def _leave_gate(self, num_bytes: int) -> None:
        self._num_queued_bytes -= num_bytes
        self._gate.leave(self._control.remote, num_bytes)

    def _erase(self) -> None:
        self._channel.erase()
        if self._dealt.is_set():
            self._opener.erase()
            self._sealer.erase()

    async def _pump(self) -> None:
        target = self._control
        following = self.open.next
        try:
            if following is not None:
                target = await self._connect_next()
            while True:
                pending = await self._queue.get()
                output_TD = await pending.output
                offset = 0
                for header, table in pending.chunks:
                    end = offset + table.num_tokens
                    await self._send(target, header, table, output_TD[offset:end])
                    offset = end
                self._leave_gate(pending.num_bytes)
        except PlanetServeError as error:
            if following is not None and isinstance(error, StreamClosed):
                error.peer_id = following.peer_id
            if isinstance(error, RemoteProtocolError) and self.open.edge:
                # The engine refused what the upstream hop computed.
                error.peer_id = self.open.previous
            raise
        finally:
            if following is not None and target is not self._control:
                await target.close()

    async def _connect_next(self) -> FrameStream:
        following = self.open.next
        if following is None:
            raise SessionClosed("the last hop has no next one")
        try:
            stream = await open_stream(
                self._node,
                following.peer_id,
                following.addresses,
                PUSH_PROTOCOL,
                _CONNECT_TIMEOUT_S,
            )
            hello = PushHello(edge=self.open.edge + 1, epoch=self.open.epoch)
            header = FrameHeader(
                FrameType.HELLO, session=self.session_id, edge=hello.edge, epoch=hello.epoch
            )
            await stream.send(header, hello.encode())
        except PlanetServeError as error:
            error.peer_id = following.peer_id
            raise
        return stream

    async def _send(
        self, target: FrameStream, received: FrameHeader, table: StepTable, output_TD: torch.Tensor
    ) -> None:
        is_last = self.open.next is None
        keep_last = bool(received.flags & FLAG_KEEP_LAST)
        if is_last and keep_last:
            output_TD = output_TD[table.last_tokens()]
        output_TD = output_TD.to(self._torch_dtype)
        header = FrameHeader(
            FrameType.STEP,
            session=self.session_id,
            edge=self.open.edge + 1,
            epoch=self.open.epoch,
            step=received.step,
            position=received.position,
            num_tokens=received.num_tokens,
            span_start=self.open.end,
            span_end=0 if is_last else self._next_end,
            dtype=self._dtype,
            shape=tuple(output_TD.shape),
            chunk=received.chunk,
            num_chunks=received.num_chunks,
            flags=received.flags,
        )
        body = tensor_bytes(output_TD)
        parts: list[bytes | memoryview] = [body] if is_last else [table.pack(), body]
        header, sealed = self._sealer.seal(header, parts, asyncio.get_running_loop().time())
        await target.send(header, sealed)

    @property
    def _next_end(self) -> int:
        return self.open.next.end if self.open.next else 0

    async def _report(self, error: BaseException) -> PlanetServeError:
        if not isinstance(error, PlanetServeError):
            logger.error("session failed: %s", type(error).__name__, exc_info=error)
            error = PlanetServeError("the server failed to run the step")
        reply = error_reply(error, error.peer_id or "")
        header = FrameHeader(FrameType.ERROR, session=self.session_id, edge=self.open.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self._control.send(header, reply.encode())
        return error
