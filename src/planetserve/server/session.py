"""One session at one hop: its parts, and its life between OPEN and end.

What comes in is `upstream.py`, what goes out `downstream.py`, the engine between them
`step_pipeline.py`, and what the client says and is told `session_control.py`. A neighbour that is
lost leaves the session waiting: the client names another in its place. Any other failure ends the
session with one typed error to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planetserve.crypto.secrets import ChannelSecret
from planetserve.edge.receiver import StepReceiver
from planetserve.edge.replay_buffer import ReplayBuffer, ReplayBytes
from planetserve.edge.sender import StepSender
from planetserve.engine.engine import Engine
from planetserve.errors import HopTimeout, PlanetServeError, RemoteProtocolError, StreamClosed
from planetserve.server.backpressure import PeerBackpressure, StepBackpressure
from planetserve.server.downstream import Downstream
from planetserve.server.next_hop_dials import Dials
from planetserve.server.receipts import ReceiptSigner, SessionReceipts
from planetserve.server.session_control import ClientReports, SessionControl
from planetserve.server.step_pipeline import StepPipeline, blame_upstream
from planetserve.server.upstream import Upstream
from planetserve.swarm.network import Stream
from planetserve.tensors import named_dtype
from planetserve.types import BlockSpan
from planetserve.wire.frame import FrameType
from planetserve.wire.messages import OpenSession, PushHello
from planetserve.wire.protocols import RECEIPTS

logger = logging.getLogger(__name__)

NewSender = Callable[[bytes, torch.dtype], StepSender]


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sessions of a server share."""

    engine: Engine
    gate: StepBackpressure
    dials: Dials
    replay_bytes: ReplayBytes
    new_sender: NewSender = StepSender
    """Makes the sending end of the edge that leaves a session, of its id and dtype."""
    signer: ReceiptSigner | None = None
    """Signs receipts for sessions that ask for them; None if the server gives none."""


class ServerSession:
    """A session between its OPEN and its end.

    Activations are opened and sealed with keys of this session's two edges only.

    Args:
        shared: the engine, and what bounds the sessions of all peers together.
        session_id: the client's own name for it.
        message: its OPEN.
        stream: the client's.
        channel: this hop's end of the handshake, through which the client sends edge keys.
    """

    def __init__(
        self,
        shared: Shared,
        session_id: bytes,
        message: OpenSession,
        stream: Stream,
        channel: ChannelSecret,
    ):
        self.key = session_id + message.edge.to_bytes(2, "big") + stream.remote.encode()
        """Names the session in the engine; unique in this process. A session id is its client's
        own: whoever learns it, as every hop does, can open nothing in the client's place."""
        self.session_id = session_id
        self.open = message
        engine, dtype = shared.engine, named_dtype(message.dtype)
        self._share = PeerBackpressure(shared.gate, stream.remote)
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reports = ClientReports(stream, session_id, message.edge)
        sender = shared.new_sender(session_id, dtype)
        self._receipts: SessionReceipts | None = None
        if shared.signer is not None and RECEIPTS in message.capabilities:
            self._receipts = SessionReceipts(shared.signer, session_id, message, stream)
            sender.observer = self._receipts.outgoing
        receiver = StepReceiver(
            session_id,
            message.edge,
            engine.runner.hidden_size,
            dtype,
            num_rows=message.num_rows,
            span=BlockSpan(message.start, message.end),
            first_step=message.first_step,
            observer=None if self._receipts is None else self._receipts.incoming,
        )
        self._upstream = Upstream(
            message,
            stream,
            self._share,
            receiver,
            chunkable=engine.runner.chunkable,
            reserve=lambda num_tokens: engine.reserve(self.key, num_tokens),
        )
        self._replay_buffer: ReplayBuffer | None = None
        if message.next is not None:
            self._replay_buffer = ReplayBuffer(
                message.num_rows,
                stream.remote,
                shared.replay_bytes,
                max_tokens=lambda: engine.leased_tokens(self.key),
            )
        self._downstream = Downstream(
            shared.dials,
            message,
            stream,
            sender,
            self._replay_buffer,
            load_ms=lambda: engine.decode_ms_per_block,
            report=self._reports.next_hop_lost,
            fail=self.fail,
        )
        self._pipeline = StepPipeline(self.key, engine, self._upstream, self._downstream)
        self._control = SessionControl(
            message,
            self._reports,
            channel,
            self._upstream,
            self._downstream,
            self._pipeline,
            self._receipts,
        )
        self._ingesting: set[asyncio.Task[None]] = set()

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
            asyncio.create_task(self._control.run()),
            asyncio.create_task(self._pipeline.run()),
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

    def fail(self, error: Exception) -> None:
        """End the session with `error`, from any task."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def announce_leaving(self) -> None:
        """Ask the client to move; the session goes on here until it does."""
        await self._reports.leaving()

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
        await self._control.has_keys.wait()
        try:
            while stream is self._upstream.stream:
                header = await stream.peek()
                if header.type is not FrameType.STEP:
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")
                await self._pipeline.take(stream, header)
        except (StreamClosed, HopTimeout):
            # The client learns of a lost hop from its own stream, and names another here.
            return
        except Exception as error:  # noqa: BLE001 - the session reports it, whatever it is
            blame_upstream(error, stream.remote)
            self.fail(error)

    def end_ingesting(self) -> None:
        """Take no frame that still comes, and no other stream."""
        self._upstream.close()
        for task in self._ingesting:
            task.cancel()

    async def _release(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Give back all that the session holds, even if this is cancelled half-way."""
        with contextlib.ExitStack() as held:
            held.callback(self._share.close)
            if self._replay_buffer is not None:
                held.callback(self._replay_buffer.close)
            held.callback(self._control.erase)
            if self._receipts is not None:
                self._receipts.stop()
            self.end_ingesting()
            for task in tasks:
                task.cancel()
            self._failure.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                await self._downstream.close()

    async def _report(self, error: BaseException) -> PlanetServeError:
        if not isinstance(error, PlanetServeError):
            logger.error("session failed: %s", type(error).__name__, exc_info=error)
            error = PlanetServeError("the server failed to run the step")
        await self._reports.failed(error)
        return error
