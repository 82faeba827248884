"""The client's side of one hop: its stream, its channel, and what it says.

A link lives from OPEN until its hop is lost, replaced or no longer needed. What the hop says that
concerns the ring goes into the ring's inbox, in order; answers to a question go to who asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from planetserve.client.ring.receipts import Compare, HopReceipts
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.crypto.handshake import ClientHandshake
from planetserve.crypto.secrets import ChannelSecret, seal_edge_keys
from planetserve.errors import (
    EdgeStalled,
    HopTimeout,
    PeerReportedError,
    PlanetServeError,
    RemoteProtocolError,
)
from planetserve.swarm.network import Network, Stream
from planetserve.tensors import dtype_name, wire_dtype
from planetserve.types import CLIENT, Hop, PeerId, ServerInfo
from planetserve.wire import protocols
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import (
    ErrorReply,
    NextHop,
    OpenSession,
    Progress,
    Rewire,
    SessionOpened,
    decode,
    from_text,
    to_text,
)
from planetserve.wire.protocols import SESSION_PROTOCOL

T = TypeVar("T")


@dataclass(slots=True)
class StepFrame:
    """A STEP frame that a hop has sent."""

    link: HopConnection
    header: FrameHeader
    payload: bytearray


@dataclass(slots=True)
class HopFailure:
    """What a hop has failed with, or says that its neighbour has."""

    link: HopConnection
    error: PlanetServeError


Inbox = asyncio.Queue[StepFrame | HopFailure]

_CLOSE_TIMEOUT_S = 1.0
_NOTICES = (FrameType.LEAVING, FrameType.REWIRED, FrameType.STATUS)
LEAST_CHUNK_TOKENS = 16
ENOUGH_CHUNK_TOKENS = 64
"""Chunks this large cost a prompt little; single tokens would make it as slow as a text."""
MAX_NOTICES = 8
"""LEAVING frames, of which one would do; an answer that no question is left for counts as one."""
MAX_UNREAD = 16
"""Frames of one hop that wait for the ring. More than an honest one ever has there while the ring
reads nothing: answers to the chunks in flight and news of a lost neighbour."""


def chunk_tokens(links: Iterable[HopConnection]) -> int:
    """How long chunks are that these hops get: as each of them wishes, but one that wishes for less
    than `ENOUGH_CHUNK_TOKENS` speaks for itself alone. It has to cut what it cannot compute at
    once."""
    wishes = [link.max_chunk_tokens for link in links]
    return max(min(wishes), min(ENOUGH_CHUNK_TOKENS, max(wishes)), LEAST_CHUNK_TOKENS)


class HopConnection:
    """A hop of one session. `open` before anything else, `close` at the end.

    Args:
        hop: who runs which blocks.
        info: what the hop's server announces.
        edge: the edge that enters it; names it in the session.
        inbox: where STEP frames and failures go.
        compare: is given the hop's receipts; None asks for none.
    """

    def __init__(
        self,
        hop: Hop,
        info: ServerInfo,
        edge: int,
        session_id: bytes,
        inbox: Inbox,
        compare: Compare | None = None,
    ):
        self.hop = hop
        self.info = info
        self.edge = edge
        self.epoch_out = 0
        """Epoch of the edge that leaves the hop."""
        self.is_filling = False
        """Whether it may not have all that is to be in its KV cache."""
        self.is_leaving = False
        """Whether it has said that it will leave soon."""
        self.lost: PlanetServeError | None = None
        """Why nothing comes from it any more."""
        self.lost_s = 0.0
        """When it was lost, by the event loop's time."""
        self.max_chunk_tokens = 1
        self.receipts: HopReceipts | None = None
        """Of a hop that signs any."""
        self._session_id = session_id
        self._inbox = inbox
        self._compare = compare
        self._unread = asyncio.Semaphore(MAX_UNREAD)
        # Edges of this hop, past ones too, by the peer at their other end.
        self._edges: dict[str, tuple[str, str]] = {}
        self._stream: Stream | None = None
        self._channel: ChannelSecret | None = None
        self._reader: asyncio.Task[None] | None = None
        self._rewired: asyncio.Future[None] | None = None
        self._progress: asyncio.Future[Progress] | None = None
        self._num_asked = 0
        self._num_unasked = -MAX_NOTICES
        self.ended = asyncio.Event()
        """Set together with `lost`."""

    @property
    def peer_id(self) -> PeerId:
        return self.hop.peer_id

    @property
    def stream(self) -> Stream:
        """The open session stream."""
        if self._stream is None:
            raise RuntimeError("open the link first")
        return self._stream

    def as_next(self, *, fresh: bool) -> NextHop:
        """What the hop before it has to know."""
        return NextHop(
            peer_id=self.peer_id,
            edge=self.edge,
            fresh=fresh,
            end=self.hop.end,
            addresses=list(self.info.addresses),
        )

    async def open(
        self,
        node: Network,
        spec: RingSpec,
        *,
        epoch: int,
        previous: str,
        following: NextHop | None,
        first_step: int,
    ) -> None:
        """OPEN and handshake.

        Raises:
            PlanetServeError: the hop refused, cannot be reached, or is not who it should be;
                `peer_id` names it.
        """
        handshake = ClientHandshake(self._session_id, self.edge, self.peer_id)
        optional = protocols.CAPABILITIES
        if self._compare is not None:
            optional |= {protocols.RECEIPTS}
        capabilities = sorted(optional.intersection(self.info.capabilities))
        message = OpenSession(
            model=self.info.model,
            fingerprint=self.info.fingerprint,
            dtype=dtype_name(spec.dtype),  # type: ignore[arg-type]
            start=self.hop.start,
            end=self.hop.end,
            num_rows=spec.num_rows,
            max_length=spec.max_length,
            edge=self.edge,
            epoch=epoch,
            previous=previous,
            next=following,
            first_step=first_step,
            offer=to_text(handshake.offer),
            capabilities=capabilities,
        ).encode()
        self.epoch_out = epoch
        timeout_s = spec.connect_timeout_s
        try:
            self._stream = stream = await node.open_stream(
                self.peer_id, self.info.addresses, SESSION_PROTOCOL, timeout_s
            )
            await stream.send(self._header(FrameType.OPEN), message)
            answer, payload = await stream.receive(timeout_s)
            if answer.type is FrameType.ERROR:
                # Nothing has passed between it and its neighbours: it speaks for itself.
                raise self._reported(payload)
            if answer.type is not FrameType.OPENED:
                raise RemoteProtocolError(f"expected OPENED, got {answer.type.name}")
            opened = decode(SessionOpened, payload)
            key, signature = from_text(opened.answer), from_text(opened.signature)
            self._channel = handshake.finish(message, key, signature)
        except PlanetServeError as error:
            error.peer_id = error.peer_id or self.peer_id
            raise
        self.max_chunk_tokens = opened.max_chunk_tokens
        self._note_edges(previous, following)
        if self._compare is not None and protocols.RECEIPTS in capabilities:
            self.receipts = HopReceipts(
                self.hop,
                self.info,
                self._session_id,
                handshake.offer,
                wire_dtype(spec.dtype),
                self._compare,
            )
            self.receipts.opened(self.edge, epoch, following, first_step)
        self._reader = asyncio.create_task(self._read(stream))

    async def send_edge_keys(
        self, epoch: int, inbound: bytearray, outbound: bytearray, rewire: bytes = b""
    ) -> None:
        """Give the hop the secrets of its two edges.

        Raises:
            StreamClosed: it has gone.
        """
        if self._channel is None:
            raise RuntimeError("open the link first")
        blob = seal_edge_keys(self._channel, epoch, inbound, outbound, rewire)
        await self._send(FrameType.EDGE_KEYS, blob)

    async def rewire(
        self, message: Rewire, inbound: bytearray, outbound: bytearray, timeout_s: float
    ) -> None:
        """Give the hop another neighbour, and wait until it says that it has it.

        Raises:
            PlanetServeError: it has gone, or does not answer; `peer_id` names it.
        """
        self._num_asked += 1
        self._rewired = asyncio.get_running_loop().create_future()
        self._note_edges(message.previous, message.next)
        if self.receipts is not None:
            self.receipts.rewired(message)
        if message.next is not None:
            self.epoch_out = message.epoch
        payload = message.encode()
        await self._send(FrameType.REWIRE, payload)
        await self.send_edge_keys(message.epoch, inbound, outbound, payload)
        await self._answered(self._rewired, timeout_s)

    async def progress(self, timeout_s: float) -> Progress:
        """How far the hop has come.

        Raises:
            PlanetServeError: it has gone, or does not answer; `peer_id` names it.
        """
        self._num_asked += 1
        self._progress = asyncio.get_running_loop().create_future()
        await self._send(FrameType.STATUS, b"")
        return await self._answered(self._progress, timeout_s)

    async def finish(self, timeout_s: float) -> None:
        """Tell the hop that the session is over, and wait for its last receipt. Never raises."""
        receipts = self.receipts
        if receipts is None or self.lost is not None:
            return
        receipts.is_asked_last = True
        with contextlib.suppress(PlanetServeError):
            await self._send(FrameType.CLOSE, b"")
        either = [
            asyncio.ensure_future(receipts.is_complete.wait()),
            asyncio.ensure_future(self.ended.wait()),
        ]
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()

    async def close(self) -> None:
        """Tell the hop that the session is over, and let go of it. Never raises."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            self._channel.erase()
        if self._stream is not None:
            with contextlib.suppress(PlanetServeError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._stream.send(self._header(FrameType.CLOSE))
            await self._stream.close()

    def took(self) -> None:
        """The ring has taken a frame of this hop out of its inbox."""
        self._unread.release()

    async def _answered(self, answer: asyncio.Future[T], timeout_s: float) -> T:
        ended = asyncio.ensure_future(self.ended.wait())
        either: tuple[asyncio.Future[Any], ...] = (answer, ended)
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if answer.done():
            return answer.result()
        answer.cancel()
        error = self.lost or HopTimeout("a server has stopped answering")
        if error.edge is None:
            error.peer_id = self.peer_id
        raise error

    async def _send(self, kind: FrameType, payload: bytes) -> None:
        try:
            await self.stream.send(self._header(kind), payload)
        except PlanetServeError as error:
            error.peer_id = self.peer_id
            raise

    def _header(self, kind: FrameType) -> FrameHeader:
        return FrameHeader(kind, session=self._session_id, edge=self.edge)

    async def _read(self, stream: Stream) -> None:
        try:
            while True:
                header, payload = await stream.receive()
                self._count_notice(header.type)
                match header.type:
                    case FrameType.STEP:
                        await self._unread.acquire()
                        self._inbox.put_nowait(StepFrame(self, header, payload))
                    case FrameType.LEAVING:
                        self.is_leaving = True
                    case FrameType.RECEIPT if self.receipts is not None:
                        self.receipts.take(payload)
                    case FrameType.NEXT_HOP_LOST:
                        await self._unread.acquire()
                        self._on_parked(header, payload)
                    case FrameType.REWIRED if self._rewired and not self._rewired.done():
                        self._rewired.set_result(None)
                    case FrameType.STATUS if self._progress and not self._progress.done():
                        self._progress.set_result(decode(Progress, payload))
                    case FrameType.REWIRED | FrameType.STATUS:
                        continue  # whoever asked has given up
                    case FrameType.ERROR:
                        raise self._reported(payload)
                    case _:
                        raise RemoteProtocolError(f"unexpected {header.type.name} frame")
        except PlanetServeError as error:
            if error.edge is None:
                error.peer_id = self.peer_id
            self.lost, self.lost_s = error, asyncio.get_running_loop().time()
            self.ended.set()
            self._inbox.put_nowait(HopFailure(self, error))

    def _count_notice(self, kind: FrameType) -> None:
        self._num_unasked += kind in _NOTICES
        if self._num_unasked > self._num_asked:
            raise RemoteProtocolError("frames that nobody asked for")

    def _on_parked(self, header: FrameHeader, payload: bytearray) -> None:
        accused = decode(ErrorReply, payload).blamed_peer
        error = EdgeStalled("a server cannot reach the next one")
        error.edge, error.epoch = (self.peer_id, accused), header.epoch
        self._inbox.put_nowait(HopFailure(self, error))

    def _reported(self, payload: bytearray) -> PeerReportedError:
        """What the hop reports, as its words.

        A hop that blames one it exchanges frames with makes a claim, which either of them may be
        at fault for; if it blames anybody else, it is at fault itself.
        """
        reply = decode(ErrorReply, payload)
        error = PeerReportedError.of(self.peer_id, reply.code, reply.message, reply.retry_after_s)
        edge = self._edges.get(reply.blamed_peer)
        if edge is None:
            error.peer_id = self.peer_id
        else:
            error.edge = edge
        return error

    def _note_edges(self, previous: str | None, following: NextHop | None) -> None:
        if previous not in (None, CLIENT, self.peer_id):
            self._edges[previous] = (previous, self.peer_id)
        if following is not None and following.peer_id != self.peer_id:
            self._edges[following.peer_id] = (self.peer_id, following.peer_id)
