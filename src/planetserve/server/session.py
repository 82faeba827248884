"""One session at one hop: frames in, engine steps, frames out, in order and bounded.

The client's stream brings deals, rewirings and the end, and at the first hop the STEP frames;
`ingest` takes those of the hop before from its push stream. What they become goes through the
engine, and `_pump` hands its answers to the outlet (`outlet.py`) in the same order. The queue
between them is bounded, so a slow consumer stops the reading of its own producer and nobody else's.

A neighbour that is lost leaves the session waiting: the client names another in its place. Any
other failure ends the session with one typed error to the client.
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
    DecryptionFailed,
    PlanetServeError,
    RemoteProtocolError,
    SessionError,
    StreamClosed,
)
from planetserve.server.gate import StepGate
from planetserve.server.outlet import Outlet
from planetserve.server.step_order import StepOrder
from planetserve.swarm.node import SwarmNode
from planetserve.swarm.streams import FrameStream
from planetserve.tensors import is_finite, tensor_from_payload
from planetserve.types import CLIENT
from planetserve.wire.frame import HEADER_BYTES, Direction, FrameHeader, FrameType, WireDtype
from planetserve.wire.messages import (
    OpenSession,
    Progress,
    PushHello,
    Rewire,
    decode,
    error_reply,
)
from planetserve.wire.step import StepTable

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 8
"""Steps that a hop takes in before it stops reading; a client has no more chunks under way."""
_MAX_REWIRES = 256
_DEAL_TIMEOUT_S = 10.0
_LEAST_ASKING_PERIOD_S = 0.1
"""An answer to STATUS that comes sooner after the one before is held back, and so is what follows
on the stream: a question costs more to answer than to ask."""
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
    entering_s: float
    """From the arrival of the last of these frames to the engine."""

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
        self.key = session_id + message.edge.to_bytes(2, "big") + control.remote.encode()
        """Names the session in the engine; unique in this process. A session id is its client's
        own: whoever learns it, as every hop does, can open nothing in the client's place."""
        self.session_id = session_id
        self.open = message
        self._engine = engine
        self._gate = gate
        self._num_queued_bytes = 0
        self._control = control
        self._max_step_tokens = max_step_tokens
        self._dtype, self._torch_dtype = _WIRE_DTYPES[message.dtype]
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue(MAX_STEPS_IN_FLIGHT)
        self._held: list[tuple[FrameHeader, StepTable, torch.Tensor]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._previous = message.previous
        self._epoch = message.epoch
        self._inlet: FrameStream | None = control if message.previous == CLIENT else None
        self._order = StepOrder()
        self._channel = channel
        self._opener: Opener | None = None
        self._outlet = Outlet(
            node,
            session_id,
            message,
            control,
            self._torch_dtype,
            load_ms=lambda: engine.decode_ms_per_block,
            report=self._report_parked,
            fail=self.fail,
        )
        self._dealt = asyncio.Event()
        self._num_rewires = 0
        self._ingesting: set[asyncio.Task[None]] = set()
        self._frames_received = 0
        self._num_running = 0
        self._num_questions = 0
        self._next_answer_s = 0.0
        self.last_frame_s = 0.0
        """Monotonic time of the latest frame; the handler's idle check reads it."""

    async def run(self) -> PlanetServeError | None:
        """Serve until the client closes, something fails, or the task is cancelled.

        Returns:
            Why the session failed, of which the client is told in one ERROR frame; None if it
            just ended. Nothing is raised.
        """
        tasks = [
            asyncio.create_task(self._follow_client()),
            asyncio.create_task(self._pump()),
        ]
        try:
            await asyncio.wait([*tasks, self._failure], return_when=asyncio.FIRST_COMPLETED)
            # What ended the session from outside comes first: the tasks fail because of it.
            finished = [task for task in (self._failure, *tasks) if task.done()]
            errors = [task.exception() for task in finished if not task.cancelled()]
            error = next((item for item in errors if item is not None), None)
        finally:
            # Whatever still comes is not taken, and no other stream accepted.
            self._inlet, self._epoch = None, -1
            for task in (*tasks, *self._ingesting):
                task.cancel()
            self._failure.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._channel.erase()
            self._set_opener(None)
            await self._outlet.close()
            self._leave_gate(self._num_queued_bytes)
        return None if error is None else await self._report(error)

    def fail(self, error: PlanetServeError) -> None:
        """End the session with `error`, from any task."""
        if not self._failure.done():
            self._failure.set_exception(error)

    def blame_upstream(self, error: PlanetServeError, previous: str) -> None:
        """Name the hop before, if `error` is about what it sent: that a server is full, or that a
        pass fails, is not."""
        is_about_a_frame = isinstance(error, RemoteProtocolError | DecryptionFailed)
        # The client's own mistakes end at the first hop.
        if previous != CLIENT and (is_about_a_frame or type(error) is SessionError):
            error.peer_id = error.peer_id or previous

    async def announce_leaving(self) -> None:
        """Ask the client to move; the session goes on here until it does."""
        header = FrameHeader(FrameType.LEAVING, session=self.session_id, edge=self.open.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self._control.send(header)

    def attach(self, stream: FrameStream, hello: PushHello) -> None:
        """Accept the upstream hop's stream.

        Raises:
            RemoteProtocolError: not the peer, edge or epoch the client named, or a second stream.
        """
        expected = (self._previous, self.open.edge, self._epoch)
        if (stream.remote, hello.edge, hello.epoch) != expected or self._inlet is not None:
            raise RemoteProtocolError("a push stream that this session does not expect")
        self._inlet = stream

    async def ingest(self, stream: FrameStream) -> None:
        """Take STEP frames from the attached push stream, until it ends or another takes its place.

        Raises:
            PlanetServeError: a frame that does not belong here, or a step the engine refuses.
        """
        task = asyncio.current_task()
        if task is not None:
            # It may wait for room that nobody makes any more when the session ends.
            self._ingesting.add(task)
            task.add_done_callback(self._ingesting.discard)
        await self._dealt.wait()
        while stream is self._inlet:
            try:
                header, payload = await stream.receive()
            except StreamClosed:
                # The client learns of a lost hop from its own stream, and names another here.
                return
            if header.type is not FrameType.STEP:
                raise RemoteProtocolError(f"unexpected {header.type.name} frame")
            await self._take_step(stream, header, payload)

    async def _follow_client(self) -> None:
        """Do what the client's stream says, until CLOSE or its end."""
        control = self._control
        await self._take_first_deal()
        while True:
            try:
                header, payload = await control.receive()
            except StreamClosed:
                return
            match header.type:
                case FrameType.CLOSE:
                    return
                case FrameType.STEP if self._inlet is control:
                    await self._take_step(control, header, payload)
                case FrameType.REWIRE:
                    await self._rewire(payload)
                case FrameType.STATUS if not payload:
                    await self._answer_status()
                case _:
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")

    async def _take_step(
        self, stream: FrameStream, header: FrameHeader, payload: bytearray
    ) -> None:
        self.last_frame_s = arrived_s = asyncio.get_running_loop().time()
        await self._enter_gate(len(payload))
        if stream is not self._inlet:  # replaced while this frame waited
            self._leave_gate(len(payload))
            return
        table, hidden_TD = self._read_step(header, payload)
        self._frames_received += 1
        if not self._order.take(header):  # what it became has left
            self._leave_gate(len(payload))
            return
        await self._submit(header, table, hidden_TD, arrived_s)

    def _read_step(self, header: FrameHeader, payload: bytearray) -> tuple[StepTable, torch.Tensor]:
        message, opener = self.open, self._opener
        if opener is None:
            raise RemoteProtocolError("a step frame before its keys")
        plaintext = opener.open(header, payload)
        if (header.span_start, header.span_end) != (message.start, message.end):
            raise RemoteProtocolError("a step frame for other blocks")
        shape = (header.num_tokens, self._engine.runner.hidden_size)
        if header.shape != shape or header.dtype is not self._dtype:
            raise RemoteProtocolError("a step tensor of the wrong shape or dtype")
        table, offset = StepTable.unpack(plaintext, message.num_rows, header.num_tokens)
        if header.position != table.rows[0].start:
            raise RemoteProtocolError("a step frame whose position is not its first row's")
        return table, tensor_from_payload(plaintext, offset, header.dtype, header.shape)

    async def _submit(
        self, header: FrameHeader, table: StepTable, hidden_TD: torch.Tensor, arrived_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        if self._engine.runner.chunkable or header.num_chunks == 1:
            self._num_running += 1
            future = self._engine.submit(self.key, table, hidden_TD)
            await self._queue.put(_Pending([(header, table)], future, loop.time() - arrived_s))
            return
        # Rotary tables that depend on the longest position must see the whole step at once.
        self._held.append((header, table, hidden_TD))
        held_tokens = sum(piece.num_tokens for _, piece, _ in self._held)
        if held_tokens > self._max_step_tokens:
            raise RemoteProtocolError("a step of too many tokens")
        if header.chunk == header.num_chunks - 1:
            held, self._held = self._held, []
            whole = StepTable.merge([piece for _, piece, _ in held])
            self._num_running += 1
            future = self._engine.submit(self.key, whole, torch.cat([part for *_, part in held]))
            chunks = [(head, piece) for head, piece, _ in held]
            await self._queue.put(_Pending(chunks, future, loop.time() - arrived_s))

    async def _take_first_deal(self) -> None:
        """Receive the secrets of this hop's two edges; only then can a step be opened or sent."""
        inbound, outbound = await self._take_deal(self.open.epoch)
        try:
            self._set_opener(inbound)
            sealer = self._new_sealer(outbound, self._outlet.edge, self.open.epoch)
        finally:
            wipe(inbound, outbound)
        self._dealt.set()
        self._outlet.start(sealer)

    async def _rewire(self, payload: bytearray) -> None:
        """Put another hop in the place of one that the client has given up."""
        message = decode(Rewire, payload)
        self._num_rewires += 1
        following, previous = message.next, message.previous
        if (
            self._num_rewires > _MAX_REWIRES
            or (following is None and previous is None)
            or (following is not None and self.open.next is None)
            or (previous is not None and self._inlet is self._control)
            or previous == CLIENT
        ):
            raise RemoteProtocolError("a rewiring that does not fit the session")
        inbound, outbound = await self._take_deal(message.epoch, payload)
        try:
            if previous is not None:
                self._change_inlet(previous, message.epoch)
                self._set_opener(inbound)
            if following is not None:
                sealer = self._new_sealer(outbound, following.edge, message.epoch)
                self._outlet.rewire(message, sealer)
        finally:
            wipe(inbound, outbound)
        header = FrameHeader(
            FrameType.REWIRED, session=self.session_id, edge=self.open.edge, epoch=message.epoch
        )
        await self._control.send(header)

    def _change_inlet(self, previous: str, epoch: int) -> None:
        inlet, self._inlet = self._inlet, None
        if inlet is not None and inlet is not self._control:
            inlet.abort()
        self._previous, self._epoch = previous, epoch
        self._frames_received = 0
        if self._held:  # the rest of that step comes from the new hop, from its beginning
            self._leave_gate(sum(header.payload_bytes for header, _, _ in self._held))
            self._held.clear()
            self._order.restart_step()

    async def _take_deal(
        self, expected_epoch: int, rewire: bytearray | bytes = b""
    ) -> tuple[bytearray, bytearray]:
        header, payload = await self._control.receive(_DEAL_TIMEOUT_S)
        if header.type is not FrameType.DEAL:
            raise RemoteProtocolError(f"expected DEAL, got {header.type.name}")
        epoch, inbound, outbound = open_deal(self._channel, bytes(payload), rewire)
        if epoch != expected_epoch:
            wipe(inbound, outbound)
            raise RemoteProtocolError("secrets for another epoch than was announced")
        return inbound, outbound

    def _set_opener(self, secret: bytearray | None) -> None:
        if self._opener is not None:
            self._opener.erase()
        self._opener = None
        if secret is not None:
            self._opener = self.opener_type(
                secret, self.session_id, self.open.edge, self._epoch, Direction.FORWARD
            )

    def _new_sealer(self, secret: bytearray, edge: int, epoch: int) -> Sealer:
        now_s = asyncio.get_running_loop().time()
        return self.sealer_type(secret, self.session_id, edge, epoch, Direction.FORWARD, now_s)

    async def _answer_status(self) -> None:
        loop = asyncio.get_running_loop()
        if (wait_s := self._next_answer_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        self._next_answer_s = loop.time() + _LEAST_ASKING_PERIOD_S
        inlet = self._inlet
        # A question must not look like movement to the one who asks.
        self._num_questions += inlet is self._control
        asked_bytes = self._num_questions * HEADER_BYTES
        progress = Progress(
            frames_received=self._frames_received,
            frames_sent=self._outlet.frames_sent,
            bytes_received=0 if inlet is None else inlet.bytes_received - asked_bytes,
            steps_running=self._num_running,
        )
        header = FrameHeader(FrameType.STATUS, session=self.session_id, edge=self.open.edge)
        await self._control.send(header, progress.encode())

    async def _report_parked(self, error: PlanetServeError) -> None:
        """Tell the client that the next hop is lost; it may name another."""
        reply = error_reply(error, error.peer_id or "")
        header = FrameHeader(
            FrameType.PARKED,
            session=self.session_id,
            edge=self.open.edge,
            epoch=self._outlet.epoch,
        )
        async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
            await self._control.send(header, reply.encode())

    async def _enter_gate(self, num_bytes: int) -> None:
        is_only, must = not self._num_queued_bytes, bool(self._held)
        await self._gate.enter(self._control.remote, num_bytes, is_only=is_only, must=must)
        self._num_queued_bytes += num_bytes

    def _leave_gate(self, num_bytes: int) -> None:
        self._num_queued_bytes -= num_bytes
        self._gate.leave(self._control.remote, num_bytes)

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                pending = await self._queue.get()
                output_TD = await pending.output
                done_s = loop.time()
                self._num_running -= 1
                if not is_finite(output_TD):
                    # The next one would take it for this hop's fault.
                    raise RemoteProtocolError("what came in makes numbers that are not finite")
                offset = 0
                for header, table in pending.chunks:
                    end = offset + table.num_tokens
                    await self._outlet.push(header, table, output_TD[offset:end])
                    offset = end
                if all(table.is_decode for _, table in pending.chunks):
                    handling_s = pending.entering_s + loop.time() - done_s
                    self._engine.count_handling(1000 * handling_s)
                self._leave_gate(pending.num_bytes)
        except PlanetServeError as error:
            # The engine refused what the upstream hop computed, or was handed.
            self.blame_upstream(error, self._previous)
            raise

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
