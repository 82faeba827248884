"""One session at one hop: frames in, engine steps, frames out, in order and bounded.

The client's stream brings deals, rewirings and the end, and at the first hop the STEP frames;
`ingest` takes those of the hop before from its push stream. The upstream says what they are
(`upstream.py`); what they become goes through the engine, and `_pump` hands its answers on
(`downstream.py`) in the same order. The queue between them is bounded, so a slow consumer stops the
reading of its own producer and nobody else's.

A neighbour that is lost leaves the session waiting: the client names another in its place. Any
other failure ends the session with one typed error to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from planetserve.crypto.channel import EdgeOpener, EdgeSealer, Opener, Sealer
from planetserve.crypto.identity import peer_id_bytes
from planetserve.crypto.secrets import ChannelSecret, open_edge_keys, wipe
from planetserve.engine.engine import Engine
from planetserve.errors import (
    DecryptionFailed,
    HopTimeout,
    PeerUnreachable,
    PlanetServeError,
    RemoteProtocolError,
    SessionError,
    StreamClosed,
)
from planetserve.server.backpressure import PeerBackpressure, StepBackpressure
from planetserve.server.downstream import Downstream
from planetserve.server.next_hop_dials import Dials
from planetserve.server.replay_buffer import ReplayBuffer, ReplayBytes
from planetserve.server.upstream import Arrived, Upstream
from planetserve.swarm.network import Stream
from planetserve.tensors import is_finite
from planetserve.types import CLIENT
from planetserve.wire.frame import Direction, FrameHeader, FrameType
from planetserve.wire.messages import (
    NextHop,
    OpenSession,
    Progress,
    PushHello,
    Rewire,
    decode,
    error_reply,
)
from planetserve.wire.step import MAX_CHUNKS_IN_FLIGHT

logger = logging.getLogger(__name__)

_MAX_REWIRES = 256
_DEAL_TIMEOUT_S = 10.0
_LEAST_ASKING_PERIOD_S = 0.1
"""An answer to STATUS that comes sooner after the one before is held back, and so is what follows
on the stream: a question costs more to answer than to ask."""
_LAST_WORDS_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sessions of a server share."""

    engine: Engine
    gate: StepBackpressure
    dials: Dials
    journals: ReplayBytes


@dataclass(slots=True)
class _Pending:
    """One engine step and the frames that its output becomes."""

    arrived: Arrived
    output: asyncio.Future[torch.Tensor]
    entering_s: float
    """From the arrival of the last of these frames to the engine."""


def check_neighbours(message: OpenSession, previous: str | None, following: NextHop | None) -> None:
    """Refuse neighbours that a session of OPEN `message` cannot have.

    Raises:
        RemoteProtocolError: no peer ids, or a next hop that does not come after this one.
    """
    for peer in (previous, None if following is None else following.peer_id):
        if peer is not None and peer != CLIENT:
            peer_id_bytes(peer)
    if following is not None and (
        following.peer_id == CLIENT
        or following.end <= message.end
        or following.edge == message.edge
    ):
        raise RemoteProtocolError("a next hop that does not come after this one")


class ServerSession:
    """A session between its OPEN and its end.

    Activations are opened and sealed with keys of this session's two edges only.

    Args:
        shared: the engine, and what bounds the sessions of all peers together.
        session_id: the client's own name for it.
        message: its OPEN.
        control: the client's stream.
        channel: this hop's end of the handshake, through which the client deals edge secrets.
    """

    sealer_type: ClassVar[Callable[..., Sealer]] = EdgeSealer
    opener_type: ClassVar[Callable[..., Opener]] = EdgeOpener

    def __init__(
        self,
        shared: Shared,
        session_id: bytes,
        message: OpenSession,
        control: Stream,
        channel: ChannelSecret,
    ):
        self.key = session_id + message.edge.to_bytes(2, "big") + control.remote.encode()
        """Names the session in the engine; unique in this process. A session id is its client's
        own: whoever learns it, as every hop does, can open nothing in the client's place."""
        self.session_id = session_id
        self.open = message
        self._engine = engine = shared.engine
        self._share = PeerBackpressure(shared.gate, control.remote)
        self._control = control
        self._slots = asyncio.Semaphore(MAX_CHUNKS_IN_FLIGHT)
        self._running: deque[_Pending] = deque()
        self._awaited: asyncio.Future[torch.Tensor] | None = None
        """What the next step's output will be put into, while no step is running."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel = channel
        self._upstream = Upstream(
            message,
            control,
            self._share,
            engine.runner.hidden_size,
            chunkable=engine.runner.chunkable,
            reserve=lambda num_tokens: engine.reserve(self.key, num_tokens),
        )
        self._replay_buffer: ReplayBuffer | None = None
        if message.next is not None:
            self._replay_buffer = ReplayBuffer(
                message.num_rows,
                control.remote,
                shared.journals,
                max_tokens=lambda: engine.leased_tokens(self.key),
            )
        self._downstream = Downstream(
            shared.dials,
            session_id,
            message,
            control,
            self._replay_buffer,
            load_ms=lambda: engine.decode_ms_per_block,
            report=self._report_parked,
            fail=self.fail,
        )
        self._dealt = asyncio.Event()
        self._num_rewires = 0
        self._ingesting: set[asyncio.Task[None]] = set()
        self._next_answer_s = 0.0

    @property
    def last_frame_s(self) -> float:
        """Monotonic time of the latest step frame; 0 before the first."""
        return self._upstream.last_frame_s

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
            await self._release(tasks)
        return None if error is None else await self._report(error)

    async def _release(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Give back all that the session holds, even if this is cancelled half-way."""
        with contextlib.ExitStack() as held:
            held.callback(self._share.close)
            if self._replay_buffer is not None:
                held.callback(self._replay_buffer.close)
            held.callback(self._channel.erase)
            self.end_ingesting()
            for task in tasks:
                task.cancel()
            self._failure.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                await self._downstream.close()

    def end_ingesting(self) -> None:
        """Take no frame that still comes, and no other stream."""
        self._upstream.close()
        for task in self._ingesting:
            task.cancel()

    def fail(self, error: Exception) -> None:
        """End the session with `error`, from any task."""
        if not self._failure.done():
            self._failure.set_exception(error)

    def blame_upstream(self, error: Exception, previous: str) -> None:
        """Name the hop before, if `error` is about what it sent: that a server is full, or that a
        pass fails, is not."""
        is_about_a_frame = isinstance(error, RemoteProtocolError | DecryptionFailed)
        # The client's own mistakes end at the first hop.
        is_about_a_frame = is_about_a_frame or type(error) is SessionError
        if previous != CLIENT and isinstance(error, PlanetServeError) and is_about_a_frame:
            error.peer_id = error.peer_id or previous

    async def announce_leaving(self) -> None:
        """Ask the client to move; the session goes on here until it does."""
        header = FrameHeader(FrameType.LEAVING, session=self.session_id, edge=self.open.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self._control.send(header)

    def attach(self, stream: Stream, hello: PushHello) -> None:
        """Accept the upstream hop's stream.

        Raises:
            RemoteProtocolError: not the peer, edge or epoch the client named, or a second stream.
        """
        self._upstream.attach(stream, hello)

    async def ingest(self, stream: Stream) -> None:
        """Take STEP frames from the attached push stream, until it ends or another takes its place.

        What goes wrong ends the session.
        """
        task = asyncio.current_task()
        if task is not None:
            # It may wait for room that nobody makes any more when the session ends.
            self._ingesting.add(task)
            task.add_done_callback(self._ingesting.discard)
        await self._dealt.wait()
        try:
            while stream is self._upstream.stream:
                header = await stream.peek()
                if header.type is not FrameType.STEP:
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")
                await self._take_step(stream, header)
        except (StreamClosed, HopTimeout):
            # The client learns of a lost hop from its own stream, and names another here.
            return
        except Exception as error:  # noqa: BLE001 - the session reports it, whatever it is
            self.blame_upstream(error, stream.remote)
            self.fail(error)

    async def _follow_client(self) -> None:
        """Do what the client's stream says, until CLOSE or its end."""
        control = self._control
        if await self._is_given_up():
            return
        await self._take_first_deal()
        while True:
            try:
                header = await control.peek()
                if header.type is FrameType.STEP and self._upstream.is_control:
                    await self._take_step(control, header)
                    continue
                if header.type not in (FrameType.CLOSE, FrameType.REWIRE, FrameType.STATUS):
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")
                header, payload = await control.receive()
            except StreamClosed:
                return
            match header.type:
                case FrameType.CLOSE:
                    return
                case FrameType.REWIRE:
                    await self._rewire(payload)
                case FrameType.STATUS if not payload:
                    await self._answer_status()
                case _:
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")

    async def _take_step(self, stream: Stream, header: FrameHeader) -> None:
        arrived = await self._upstream.take(stream, header)
        if arrived is None:
            return
        await self._slots.acquire()
        awaited, self._awaited = self._awaited, None
        output = self._engine.submit(self.key, arrived.table, arrived.hidden_TD, awaited)
        entering_s = asyncio.get_running_loop().time() - arrived.arrived_s
        self._running.append(_Pending(arrived, output, entering_s))

    async def _is_given_up(self) -> bool:
        """Whether CLOSE comes instead of EDGE_KEYS, as when another hop of the ring refuses."""
        return (await self._control.peek(_DEAL_TIMEOUT_S)).type is FrameType.CLOSE

    async def _take_first_deal(self) -> None:
        """Receive the secrets of this hop's two edges; only then can a step be opened or sent."""
        inbound, outbound = await self._take_deal(self.open.epoch)
        try:
            self._upstream.set_opener(self._new_opener(inbound, self.open.epoch))
            sealer = self._new_sealer(outbound, self._downstream.edge, self.open.epoch)
        finally:
            wipe(inbound, outbound)
        self._dealt.set()
        self._downstream.start(sealer)

    async def _rewire(self, payload: bytearray) -> None:
        """Put another hop in the place of one that the client has given up."""
        message = decode(Rewire, payload)
        self._num_rewires += 1
        following, previous = message.next, message.previous
        if (
            self._num_rewires > _MAX_REWIRES
            or (following is None and previous is None)
            or (following is not None and self.open.next is None)
            or (previous is not None and self.open.previous == CLIENT)
            or previous == CLIENT
        ):
            raise RemoteProtocolError("a rewiring that does not fit the session")
        check_neighbours(self.open, previous, following)
        if await self._is_given_up():
            return
        inbound, outbound = await self._take_deal(message.epoch, payload)
        try:
            if previous is not None:
                self._upstream.change(previous, message.epoch)
                self._upstream.set_opener(self._new_opener(inbound, message.epoch))
            if following is not None:
                sealer = self._new_sealer(outbound, following.edge, message.epoch)
                self._downstream.rewire(message, sealer)
        finally:
            wipe(inbound, outbound)
        header = FrameHeader(
            FrameType.REWIRED, session=self.session_id, edge=self.open.edge, epoch=message.epoch
        )
        await self._control.send(header)

    async def _take_deal(
        self, expected_epoch: int, rewire: bytearray | bytes = b""
    ) -> tuple[bytearray, bytearray]:
        header = await self._control.peek(_DEAL_TIMEOUT_S)
        if header.type is not FrameType.EDGE_KEYS:
            raise RemoteProtocolError(f"expected EDGE_KEYS, got {header.type.name}")
        _, payload = await self._control.receive(_DEAL_TIMEOUT_S)
        epoch, inbound, outbound = open_edge_keys(self._channel, bytes(payload), rewire)
        if epoch != expected_epoch:
            wipe(inbound, outbound)
            raise RemoteProtocolError("secrets for another epoch than was announced")
        return inbound, outbound

    def _new_opener(self, secret: bytearray, epoch: int) -> Opener:
        return self.opener_type(secret, self.session_id, self.open.edge, epoch, Direction.FORWARD)

    def _new_sealer(self, secret: bytearray, edge: int, epoch: int) -> Sealer:
        now_s = asyncio.get_running_loop().time()
        return self.sealer_type(secret, self.session_id, edge, epoch, Direction.FORWARD, now_s)

    async def _answer_status(self) -> None:
        loop = asyncio.get_running_loop()
        if (wait_s := self._next_answer_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        self._next_answer_s = loop.time() + _LEAST_ASKING_PERIOD_S
        progress = Progress(
            frames_received=self._upstream.frames_received,
            frames_sent=self._downstream.frames_sent,
            bytes_received=self._upstream.bytes_received(),
            steps_running=len(self._running),
        )
        header = FrameHeader(FrameType.STATUS, session=self.session_id, edge=self.open.edge)
        await self._control.send(header, progress.encode())

    async def _report_parked(self, error: PlanetServeError) -> None:
        """Tell the client that the next hop is lost; it may name another. Why is not said."""
        reply = error_reply(PeerUnreachable(), error.peer_id or "")
        header = FrameHeader(
            FrameType.NEXT_HOP_LOST,
            session=self.session_id,
            edge=self.open.edge,
            epoch=self._downstream.epoch,
        )
        async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
            await self._control.send(header, reply.encode())

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                # Where no step is running, its future is made before it comes: one wake-up a step.
                if not self._running:
                    self._awaited = loop.create_future()
                output_TD = await (self._awaited or self._running[0].output)
                pending = self._running.popleft()
                arrived = pending.arrived
                done_s = loop.time()
                if not is_finite(output_TD):
                    # The next one would take it for this hop's fault.
                    raise RemoteProtocolError("what came in makes numbers that are not finite")
                if len(arrived.chunks) == 1:
                    await self._downstream.push(*arrived.chunks[0], output_TD)
                else:
                    offset = 0
                    for header, table in arrived.chunks:
                        end = offset + table.num_tokens
                        await self._downstream.push(header, table, output_TD[offset:end])
                        offset = end
                if arrived.table.is_decode:
                    handling_s = pending.entering_s + loop.time() - done_s
                    self._engine.count_handling(1000 * handling_s)
                self._upstream.leave(arrived)
                self._slots.release()
        except PlanetServeError as error:
            # The engine refused what the upstream hop computed, or was handed.
            self.blame_upstream(error, self._upstream.previous)
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
