"""Streams from strangers to sessions: checks an OPEN, admits it or says why not, attaches pushes.

Everything an OPEN asks for is compared with what this server serves, and with what the peer may
hold (`limits.py`), before a key is made or memory is leased; a refusal waits for nothing. One
`ServerSession` a stream; the table of sessions is bounded and its entries end with their streams,
on idleness, or at the age limit. Whatever is refused is counted by reason (`refusal_log.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass

from planetserve.clock import Clock, SystemClock
from planetserve.crypto.handshake import answer_open
from planetserve.edge.replay_buffer import ReplayBytes
from planetserve.engine.engine import Engine
from planetserve.errors import (
    CacheExhausted,
    CapacityError,
    ModelMismatchError,
    PlanetServeError,
    RemoteProtocolError,
    SessionExpired,
    UnsupportedError,
)
from planetserve.server.backpressure import StepBackpressure
from planetserve.server.limits import Admission, QueuedBytes, ServerLimits
from planetserve.server.next_hop_dials import Dials
from planetserve.server.receipts import ReceiptSigner
from planetserve.server.refusal_log import RefusalLog
from planetserve.server.session import ServerSession, Shared
from planetserve.server.session_control import check_neighbours
from planetserve.swarm.network import Network, Stream
from planetserve.types import CLIENT, BlockSpan, PeerId
from planetserve.wire import protocols
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import (
    OpenSession,
    PushHello,
    SessionOpened,
    decode,
    error_reply,
    from_text,
    to_text,
)
from planetserve.wire.protocols import PUSH_PROTOCOL, RECEIPTS, SESSION_PROTOCOL

_FIRST_FRAME_TIMEOUT_S = 5.0
_LAST_WORDS_TIMEOUT_S = 1.0
_MAX_WAITING_PUSHES = 256
_MAX_WAITING_PUSHES_PER_PEER = 64
_CHECK_PERIOD_S = 5.0

SessionKey = tuple[PeerId, bytes, int]
"""Who opened a session, its id, and the edge that enters this hop. Two peers may open sessions of
one id, so that a hop, which knows the ids of its chain, cannot take a place that is not its own."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What an OPEN must agree with."""

    prefix: str
    fingerprint: str
    span: BlockSpan
    max_session_tokens: int


def capabilities(*, gives_receipts: bool) -> frozenset[str]:
    """The optional parts of the protocol that a server knows."""
    return protocols.CAPABILITIES | {RECEIPTS} if gives_receipts else protocols.CAPABILITIES


class SessionHandler:
    """Accepts sessions for `model` on `node` and runs them on `engine`; `signer` signs receipts."""

    def __init__(
        self,
        node: Network,
        engine: Engine,
        model: ServedModel,
        limits: ServerLimits,
        clock: Clock | None = None,
        signer: ReceiptSigner | None = None,
    ):
        self._node = node
        self._engine = engine
        self._model = model
        self._limits = limits
        clock = clock or SystemClock()
        self._admission = Admission(limits, clock)
        self._gate = StepBackpressure(QueuedBytes(limits))
        self._replay_bytes = ReplayBytes()
        dials = Dials(node, limits, clock)
        self.shared = Shared(engine, self._gate, dials, self._replay_bytes, signer=signer)
        """What every session gets that is opened from now on."""
        self._refusals = RefusalLog(clock)
        self._sessions: dict[SessionKey, ServerSession] = {}
        # Pushes whose OPEN is still on its way, by session and the peer that pushes: a stranger
        # who says HELLO first must not keep the right one out.
        self._waiting: dict[tuple[SessionKey, PeerId], asyncio.Future[ServerSession]] = {}
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def counters(self) -> Counter[str]:
        """How often what was refused since the start.

        Keys: `frame` (a stream whose first frame was bad, cut short or never came), `open.CODE`,
        `push.CODE` and `session.CODE`, CODE being that of the error that the peer got; a push that
        does not fit its session is `push.mismatch`, one without a session `push.unknown`.
        """
        return self._refusals.counts

    @property
    def queued_bytes(self) -> int:
        """Bytes of step frames that were accepted and not yet answered or passed on."""
        return self._gate.queued.total

    @property
    def replay_bytes(self) -> int:
        """Bytes of what was passed on, kept for hops that may have to be replaced."""
        return self._replay_bytes.total

    @property
    def num_sessions(self) -> int:
        """Sessions open now."""
        return len(self._sessions)

    async def start(self) -> None:
        """Begin to accept streams."""
        await self._node.serve_streams(SESSION_PROTOCOL, self._on_session)
        await self._node.serve_streams(PUSH_PROTOCOL, self._on_push)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions, ask the open ones to move, and wait at most `timeout_s` for it."""
        self._draining = True
        self._refusals.log_totals()
        if self._sessions and timeout_s > 0:
            await asyncio.gather(*(item.announce_leaving() for item in self._sessions.values()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()

    async def _on_session(self, stream: Stream) -> None:
        over_s = asyncio.get_running_loop().time() + _FIRST_FRAME_TIMEOUT_S
        header = await self._first_header(stream, over_s)
        if header is None:
            return
        # Whatever the session takes goes onto this stack at once.
        with contextlib.ExitStack() as held:
            try:
                self._check_asker(stream.remote, header)
                payload = await self._first_payload(stream, over_s)
                if payload is None:
                    return
                session, opened = self._admit(held, stream, header, payload)
            except PlanetServeError as error:
                held.close()
                await self._refuse(stream, header, error, f"open.{error.code}")
                return
            answer = FrameHeader(FrameType.OPENED, session=header.session, edge=header.edge)
            async with asyncio.timeout(_FIRST_FRAME_TIMEOUT_S):
                await stream.send(answer, opened.encode())
            failure = await self._run(session)
            if failure is not None:
                self._refusals.add(f"session.{failure.code}", failure.peer_id or stream.remote)

    def _forget(self, key: SessionKey) -> None:
        del self._sessions[key]
        self._admission.closed(key[0])
        if not self._sessions:
            self._idle.set()

    async def _first_header(self, stream: Stream, over_s: float) -> FrameHeader | None:
        """The header of a stream's first frame; None if there is none by `over_s`."""
        try:
            return await stream.peek(over_s - asyncio.get_running_loop().time())
        except UnsupportedError as error:
            # It may speak this node's version too, once it knows.
            await self._refuse(stream, FrameHeader(FrameType.ERROR), error, "frame")
            return None
        except PlanetServeError:
            self._refusals.add("frame", stream.remote)
            return None

    async def _first_payload(self, stream: Stream, over_s: float) -> bytearray | None:
        try:
            return (await stream.receive(over_s - asyncio.get_running_loop().time()))[1]
        except PlanetServeError:
            self._refusals.add("frame", stream.remote)
            return None

    def _check_asker(self, remote: PeerId, header: FrameHeader) -> None:
        self._check_staying()
        self._admission.ask(remote)
        if header.type is not FrameType.OPEN:
            raise RemoteProtocolError(f"expected OPEN, got {header.type.name}")

    def _check_staying(self) -> None:
        if self._draining:
            raise CapacityError("this server is leaving the swarm", retry_after_s=60.0)

    async def _refuse(
        self, stream: Stream, header: FrameHeader, error: PlanetServeError, reason: str
    ) -> None:
        """Count it and tell the peer why, if it listens."""
        self._refusals.add(reason, stream.remote)
        reply = FrameHeader(FrameType.ERROR, session=header.session, edge=header.edge)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await stream.send(reply, error_reply(error).encode())

    async def _run(self, session: ServerSession) -> PlanetServeError | None:
        loop = asyncio.get_running_loop()
        opened_s = loop.time()
        running = asyncio.create_task(session.run())
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_CHECK_PERIOD_S)
                now_s = loop.time()
                if now_s - max(opened_s, session.last_frame_s) > self._limits.step_timeout_s:
                    session.fail(SessionExpired("no step within the server's step timeout"))
                if now_s - opened_s > self._limits.session_timeout_s:
                    session.fail(SessionExpired("the session passed the server's age limit"))
            return running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _admit(
        self,
        held: contextlib.ExitStack,
        stream: Stream,
        header: FrameHeader,
        payload: bytearray,
    ) -> tuple[ServerSession, SessionOpened]:
        # Many may have been let through while the rest of this frame was on its way.
        self._check_staying()
        self._admission.check_room(stream.remote)
        message = decode(OpenSession, payload)
        key = (stream.remote, header.session, message.edge)
        self._check(message, header, key)
        answer, signature, channel = answer_open(
            self._node.identity,
            header.session,
            message.edge,
            bytes(payload),
            from_text(message.offer),
        )
        held.callback(channel.erase)
        session = ServerSession(self.shared, header.session, message, stream, channel)
        try:
            self._lease(session, stream.remote)
        except CacheExhausted as refusal:
            if not self._make_room(message, stream.remote, refusal.retry_after_s):
                raise
            self._lease(session, stream.remote)
        held.callback(self._engine.close_session, session.key)
        self._sessions[key] = session
        self._admission.opened(stream.remote)
        held.callback(self._forget, key)
        self._idle.clear()
        opened = SessionOpened(
            max_chunk_tokens=self._limits.max_chunk_tokens,
            chunkable=self._engine.runner.chunkable,
            free_cache_tokens=self._engine.stats().free_cache_tokens,
            answer=to_text(answer),
            signature=to_text(signature),
        )
        # A push stream waits for the session's keys, even if the client never sends them.
        held.callback(session.end_ingesting)
        waiting = self._waiting.pop((key, message.previous), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(session)
        return session, opened

    def _lease(self, session: ServerSession, peer_id: PeerId) -> None:
        message = session.open
        span = BlockSpan(message.start, message.end)
        self._engine.open_session(session.key, peer_id, message.num_rows, message.max_length, span)

    def _make_room(self, message: OpenSession, peer_id: PeerId, retry_after_s: float) -> bool:
        """End sessions of peers that hold more than their share, if that is enough."""
        keys = set(self._engine.over_share(peer_id, message.num_rows, message.max_length))
        for session in self._sessions.values():
            if session.key in keys:
                session.fail(
                    CacheExhausted("others need the KV cache that this took", retry_after_s)
                )
                self._engine.close_session(session.key)
        return bool(keys)

    def _check(self, message: OpenSession, header: FrameHeader, key: SessionKey) -> None:
        model = self._model
        if (message.model, message.fingerprint) != (model.prefix, model.fingerprint):
            raise ModelMismatchError("this server serves another model or revision")
        if message.end <= message.start or not model.span.covers(
            BlockSpan(message.start, message.end)
        ):
            raise RemoteProtocolError(f"this server serves blocks {model.span}")
        if message.edge == 0 and message.previous != CLIENT or header.edge != message.edge:
            raise RemoteProtocolError("edge 0 comes from the client")
        check_neighbours(message, message.previous, message.next)
        if key in self._sessions:
            raise RemoteProtocolError("this session is already open here")
        known = capabilities(gives_receipts=self.shared.signer is not None)
        if not known.issuperset(message.capabilities):
            raise UnsupportedError("the session uses a capability that is unknown here")

    async def _on_push(self, stream: Stream) -> None:
        over_s = asyncio.get_running_loop().time() + _FIRST_FRAME_TIMEOUT_S
        header = await self._first_header(stream, over_s)
        if header is None:
            return
        reason = "push.protocol"
        try:
            if header.type is not FrameType.HELLO:
                raise RemoteProtocolError(f"expected HELLO, got {header.type.name}")
            payload = await self._first_payload(stream, over_s)
            if payload is None:
                return
            hello = decode(PushHello, payload)
            reason = "push.unknown"
            key = (hello.client, header.session, hello.edge)
            session = await self._find(key, stream.remote)
            reason = "push.mismatch"
            session.attach(stream, hello)
        except PlanetServeError as error:
            # The session, if there is one, goes on: whoever said this is not its upstream hop.
            await self._refuse(stream, header, error, reason)
            return
        await session.ingest(stream)

    async def _find(self, key: SessionKey, remote: PeerId) -> ServerSession:
        """The session a push belongs to; its OPEN may still be on the way from the client."""
        session = self._sessions.get(key)
        if session is not None:
            return session
        from_same = sum(peer == remote for _, peer in self._waiting)
        if (
            (key, remote) in self._waiting
            or from_same >= _MAX_WAITING_PUSHES_PER_PEER
            or len(self._waiting) >= _MAX_WAITING_PUSHES
        ):
            raise RemoteProtocolError("too many pushes for sessions that are not open")
        future: asyncio.Future[ServerSession] = asyncio.get_running_loop().create_future()
        self._waiting[key, remote] = future
        try:
            async with asyncio.timeout(_FIRST_FRAME_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise RemoteProtocolError("a push for a session that nobody opened") from None
        finally:
            self._waiting.pop((key, remote), None)
