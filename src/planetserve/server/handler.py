"""Streams from strangers to sessions: checks an OPEN, admits it or says why not, attaches pushes.

Everything an OPEN asks for is compared with what this server serves before any memory is leased.
One `ServerSession` a stream; the table of sessions is bounded and its entries end with their
streams, on idleness, or at the age limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from planetserve.crypto.handshake import answer_open
from planetserve.engine.engine import Engine
from planetserve.errors import (
    CapacityError,
    ModelMismatchError,
    PlanetServeError,
    QueueFull,
    RemoteProtocolError,
    SessionExpired,
)
from planetserve.server.session import ServerSession
from planetserve.swarm.node import SwarmNode
from planetserve.swarm.streams import FrameStream, serve_streams
from planetserve.types import CLIENT, BlockSpan
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
from planetserve.wire.protocols import PUSH_PROTOCOL, SESSION_PROTOCOL

logger = logging.getLogger(__name__)

_FIRST_FRAME_TIMEOUT_S = 5.0
_MAX_WAITING_PUSHES = 256
_CHECK_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What an OPEN must agree with."""

    prefix: str
    fingerprint: str
    span: BlockSpan
    max_session_tokens: int


@dataclass(frozen=True, slots=True)
class HandlerLimits:
    """Bounds on what strangers may hold."""

    max_sessions: int = 1024
    session_timeout_s: float = 1800.0
    step_timeout_s: float = 300.0
    max_chunk_tokens: int = 512


class SessionHandler:
    """Accepts sessions for `model` on `node` and runs them on `engine`."""

    def __init__(self, node: SwarmNode, engine: Engine, model: ServedModel, limits: HandlerLimits):
        self._node = node
        self._engine = engine
        self._model = model
        self._limits = limits
        self._sessions: dict[tuple[bytes, int], ServerSession] = {}
        self._waiting: dict[tuple[bytes, int], asyncio.Future[ServerSession]] = {}
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def num_sessions(self) -> int:
        """Sessions open now."""
        return len(self._sessions)

    async def start(self) -> None:
        """Begin to accept streams."""
        await serve_streams(self._node, SESSION_PROTOCOL, self._on_session)
        await serve_streams(self._node, PUSH_PROTOCOL, self._on_push)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions, ask the open ones to move, and wait at most `timeout_s` for it."""
        self._draining = True
        if self._sessions and timeout_s > 0:
            await asyncio.gather(*(item.announce_leaving() for item in self._sessions.values()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()

    async def _on_session(self, stream: FrameStream) -> None:
        header, payload = await stream.receive(_FIRST_FRAME_TIMEOUT_S)
        key = (header.session, header.edge)
        try:
            session, opened = self._admit(stream, header, payload)
        except PlanetServeError as error:
            reply = FrameHeader(FrameType.ERROR, session=header.session, edge=header.edge)
            await stream.send(reply, error_reply(error).encode())
            return
        try:
            answer = FrameHeader(FrameType.OPENED, session=header.session, edge=header.edge)
            await stream.send(answer, opened.encode())
            await self._run(session)
        finally:
            self._sessions.pop(key, None)
            self._engine.close_session(session.key)
            if not self._sessions:
                self._idle.set()

    async def _run(self, session: ServerSession) -> None:
        loop = asyncio.get_running_loop()
        session.last_frame_s = opened_s = loop.time()
        running = asyncio.create_task(session.run())
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_CHECK_PERIOD_S)
                now_s = loop.time()
                if now_s - session.last_frame_s > self._limits.step_timeout_s:
                    session.fail(SessionExpired("no step within the server's step timeout"))
                if now_s - opened_s > self._limits.session_timeout_s:
                    session.fail(SessionExpired("the session passed the server's age limit"))
            running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _admit(
        self, stream: FrameStream, header: FrameHeader, payload: bytearray
    ) -> tuple[ServerSession, SessionOpened]:
        if header.type is not FrameType.OPEN:
            raise RemoteProtocolError(f"expected OPEN, got {header.type.name}")
        message = decode(OpenSession, payload)
        self._check(message, header)
        key = (header.session, message.edge)
        answer, signature, channel = answer_open(
            self._node.identity,
            header.session,
            message.edge,
            bytes(payload),
            from_text(message.offer),
        )
        engine_key = header.session + message.edge.to_bytes(2, "big")
        self._engine.open_session(
            engine_key,
            stream.remote,
            message.num_rows,
            message.max_length,
            BlockSpan(message.start, message.end),
        )
        session = ServerSession(
            self._node,
            self._engine,
            engine_key,
            header.session,
            message,
            stream,
            channel,
            self._model.max_session_tokens * message.num_rows,
        )
        self._sessions[key] = session
        self._idle.clear()
        waiting = self._waiting.pop(key, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(session)
        opened = SessionOpened(
            max_chunk_tokens=self._limits.max_chunk_tokens,
            chunkable=self._engine.runner.chunkable,
            free_cache_tokens=self._engine.stats().free_cache_tokens,
            answer=to_text(answer),
            signature=to_text(signature),
        )
        return session, opened

    def _check(self, message: OpenSession, header: FrameHeader) -> None:
        model = self._model
        if (message.model, message.fingerprint) != (model.prefix, model.fingerprint):
            raise ModelMismatchError("this server serves another model or revision")
        if message.end <= message.start or not model.span.covers(
            BlockSpan(message.start, message.end)
        ):
            raise RemoteProtocolError(f"this server serves blocks {model.span}")
        if (message.previous == CLIENT) != (message.edge == 0) or header.edge != message.edge:
            raise RemoteProtocolError("the first hop, and only it, follows the client")
        if (header.session, message.edge) in self._sessions:
            raise RemoteProtocolError("this session is already open here")
        if self._draining:
            raise CapacityError("this server is leaving the swarm", retry_after_s=60.0)
        if len(self._sessions) >= self._limits.max_sessions:
            raise QueueFull(f"{len(self._sessions)} sessions are open here", retry_after_s=5.0)

    async def _on_push(self, stream: FrameStream) -> None:
        header, payload = await stream.receive(_FIRST_FRAME_TIMEOUT_S)
        if header.type is not FrameType.HELLO:
            raise RemoteProtocolError(f"expected HELLO, got {header.type.name}")
        hello = decode(PushHello, payload)
        session = await self._find((header.session, hello.edge))
        session.attach(stream.remote, hello)
        try:
            await session.ingest(stream)
        except PlanetServeError as error:
            error.peer_id = error.peer_id or stream.remote
            session.fail(error)

    async def _find(self, key: tuple[bytes, int]) -> ServerSession:
        """The session a push belongs to; its OPEN may still be on the way from the client."""
        session = self._sessions.get(key)
        if session is not None:
            return session
        if len(self._waiting) >= _MAX_WAITING_PUSHES or key in self._waiting:
            raise RemoteProtocolError("too many pushes for sessions that are not open")
        future: asyncio.Future[ServerSession] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            async with asyncio.timeout(_FIRST_FRAME_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise RemoteProtocolError("a push for a session that nobody opened") from None
        finally:
            self._waiting.pop(key, None)
