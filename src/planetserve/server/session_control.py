"""What a client and a hop say to each other about a session, apart from its steps.

On the client's stream come edge keys, rewirings, questions and the end, and at the first hop the
STEP frames; the hop's reports go back on it.
"""

from __future__ import annotations

import asyncio
import contextlib

from planetserve.crypto.identity import peer_id_bytes
from planetserve.crypto.secrets import ChannelSecret, open_edge_keys, wipe
from planetserve.errors import (
    PeerUnreachable,
    PlanetServeError,
    RemoteProtocolError,
    StreamClosed,
)
from planetserve.server.downstream import Downstream
from planetserve.server.receipts import SessionReceipts
from planetserve.server.step_pipeline import StepPipeline
from planetserve.server.upstream import Upstream
from planetserve.swarm.network import Stream
from planetserve.types import CLIENT
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import NextHop, OpenSession, Progress, Rewire, decode, error_reply

_MAX_REWIRES = 256
_EDGE_KEYS_TIMEOUT_S = 10.0
_LEAST_ASKING_PERIOD_S = 0.1
"""An answer to STATUS that comes sooner after the one before is held back, and so is what follows
on the stream: a question costs more to answer than to ask."""
_LAST_WORDS_TIMEOUT_S = 1.0


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


class ClientReports:
    """What a hop tells its client without being asked.

    Args:
        stream: the client's.
        session_id: of the session.
        edge: that enters this hop.
    """

    def __init__(self, stream: Stream, session_id: bytes, edge: int):
        self.stream = stream
        self._session_id = session_id
        self._edge = edge

    def header(self, kind: FrameType, epoch: int = 0) -> FrameHeader:
        """The header of a frame to the client."""
        return FrameHeader(kind, session=self._session_id, edge=self._edge, epoch=epoch)

    async def leaving(self) -> None:
        """Ask the client to move; the session goes on here until it does. Never raises."""
        await self._last_words(self.header(FrameType.LEAVING))

    async def failed(self, error: PlanetServeError) -> None:
        """Why the session has ended. Never raises."""
        reply = error_reply(error, error.peer_id or "")
        await self._last_words(self.header(FrameType.ERROR), reply.encode())

    async def next_hop_lost(self, error: PlanetServeError, epoch: int) -> None:
        """The next hop, which `error` names, is lost; the client may name another. Why is not said.

        Raises:
            PlanetServeError: the client has gone.
            TimeoutError: it does not listen.
        """
        reply = error_reply(PeerUnreachable(), error.peer_id or "")
        async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
            await self.stream.send(self.header(FrameType.NEXT_HOP_LOST, epoch), reply.encode())

    async def _last_words(self, header: FrameHeader, payload: bytes = b"") -> None:
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self.stream.send(header, payload)


class SessionControl:
    """Does what the client's stream says.

    Args:
        message: the session's OPEN.
        reports: has the client's stream.
        channel: this hop's end of the handshake, through which edge keys come.
        upstream: gets the keys of the edge that enters this hop.
        downstream: gets those of the edge that leaves it.
        pipeline: takes the STEP frames of a first hop.
        receipts: of a session that has any.
    """

    def __init__(
        self,
        message: OpenSession,
        reports: ClientReports,
        channel: ChannelSecret,
        upstream: Upstream,
        downstream: Downstream,
        pipeline: StepPipeline,
        receipts: SessionReceipts | None = None,
    ):
        self.has_keys = asyncio.Event()
        """Set once a step can be opened."""
        self._message = message
        self._reports = reports
        self._channel = channel
        self._upstream = upstream
        self._downstream = downstream
        self._pipeline = pipeline
        self._receipts = receipts
        self._num_rewires = 0
        self._next_answer_s = 0.0

    async def run(self) -> None:
        """Follow the client until CLOSE or the end of its stream.

        Raises:
            PlanetServeError: something that may not be said, or a step that fails.
        """
        stream = self._reports.stream
        if await self._is_given_up():
            return
        await self._take_first_keys()
        while True:
            try:
                header = await stream.peek()
                if header.type is FrameType.STEP and self._upstream.is_control:
                    await self._pipeline.take(stream, header)
                    continue
                if header.type not in (FrameType.CLOSE, FrameType.REWIRE, FrameType.STATUS):
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")
                header, payload = await stream.receive()
            except StreamClosed:
                return
            match header.type:
                case FrameType.CLOSE:
                    if self._receipts is not None:
                        await self._receipts.send_final()
                    return
                case FrameType.REWIRE:
                    await self._rewire(payload)
                case FrameType.STATUS if not payload:
                    await self._answer_status()
                case _:
                    raise RemoteProtocolError(f"unexpected {header.type.name} frame")

    def erase(self) -> None:
        """Drop the channel's keys."""
        self._channel.erase()

    async def _is_given_up(self) -> bool:
        """Whether CLOSE comes instead of EDGE_KEYS, as when another hop of the ring refuses."""
        header = await self._reports.stream.peek(_EDGE_KEYS_TIMEOUT_S)
        return header.type is FrameType.CLOSE

    async def _take_first_keys(self) -> None:
        """Receive the secrets of this hop's two edges; only then can a step be opened or sent."""
        inbound, outbound = await self._take_keys(self._message.epoch)
        try:
            self._upstream.start(inbound)
            self._downstream.start(outbound)
        finally:
            wipe(inbound, outbound)
        self.has_keys.set()

    async def _rewire(self, payload: bytearray) -> None:
        """Put another hop in the place of one that the client has given up."""
        message = decode(Rewire, payload)
        self._num_rewires += 1
        following, previous = message.next, message.previous
        if (
            self._num_rewires > _MAX_REWIRES
            or (following is None and previous is None)
            or (following is not None and self._message.next is None)
            or (previous is not None and self._message.previous == CLIENT)
            or previous == CLIENT
        ):
            raise RemoteProtocolError("a rewiring that does not fit the session")
        check_neighbours(self._message, previous, following)
        if await self._is_given_up():
            return
        inbound, outbound = await self._take_keys(message.epoch, payload)
        if self._receipts is not None:
            self._receipts.rewired(message)
        try:
            if previous is not None:
                self._upstream.change(previous, message.epoch, inbound)
            if following is not None:
                self._downstream.rewire(message, outbound)
        finally:
            wipe(inbound, outbound)
        await self._reports.stream.send(self._reports.header(FrameType.REWIRED, message.epoch))

    async def _take_keys(
        self, expected_epoch: int, rewire: bytearray | bytes = b""
    ) -> tuple[bytearray, bytearray]:
        """The secrets of the edges that enter and leave this hop; the caller wipes them."""
        stream = self._reports.stream
        header = await stream.peek(_EDGE_KEYS_TIMEOUT_S)
        if header.type is not FrameType.EDGE_KEYS:
            raise RemoteProtocolError(f"expected EDGE_KEYS, got {header.type.name}")
        _, payload = await stream.receive(_EDGE_KEYS_TIMEOUT_S)
        epoch, inbound, outbound = open_edge_keys(self._channel, bytes(payload), rewire)
        if epoch != expected_epoch:
            wipe(inbound, outbound)
            raise RemoteProtocolError("secrets for another epoch than was announced")
        return inbound, outbound

    async def _answer_status(self) -> None:
        loop = asyncio.get_running_loop()
        if (wait_s := self._next_answer_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        self._next_answer_s = loop.time() + _LEAST_ASKING_PERIOD_S
        progress = Progress(
            frames_received=self._upstream.frames_received,
            frames_sent=self._downstream.frames_sent,
            bytes_received=self._upstream.bytes_received(),
            steps_running=self._pipeline.num_running,
        )
        header = self._reports.header(FrameType.STATUS)
        await self._reports.stream.send(header, progress.encode())
