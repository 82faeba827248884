"""A client that knows the protocol and can break each of its rules, frame by frame.

Nothing here checks what it sends; that is the server's part. `Stranger` is a peer, `Opened` a
session it has opened at one hop: streams, keys and the frames that would be right.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planetserve.crypto.channel import EdgeOpener, EdgeSealer
from planetserve.crypto.handshake import ClientHandshake
from planetserve.crypto.secrets import ChannelSecret, new_edge_secret, seal_edge_keys
from planetserve.errors import PlanetServeError, StreamClosed, error_from_code
from planetserve.model.checkpoint import Checkpoint
from planetserve.server.server import Server
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.tensors import tensor_from_payload
from planetserve.types import CLIENT, PeerId
from planetserve.wire.frame import ANSWER_EDGE, Direction, FrameHeader, FrameType, WireDtype
from planetserve.wire.messages import (
    ErrorReply,
    NextHop,
    OpenSession,
    PushHello,
    SessionOpened,
    decode,
    from_text,
    to_text,
)
from planetserve.wire.protocols import PUSH_PROTOCOL, SESSION_PROTOCOL
from planetserve.wire.step import RowSlice, StepTable, unpack_answer_head

ANSWER_TIMEOUT_S = 20.0
FORWARD = Direction.FORWARD


@dataclass(frozen=True, slots=True)
class Target:
    """A server and what it serves."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    model: str
    fingerprint: str
    num_blocks: int
    hidden_size: int

    @staticmethod
    def of(checkpoint: Checkpoint, peer_id: PeerId, addresses: Sequence[str]) -> Target:
        return Target(
            peer_id, tuple(addresses), checkpoint.model_prefix, checkpoint.fingerprint,
            checkpoint.num_blocks, checkpoint.config.hidden_size,
        )  # fmt: skip

    @staticmethod
    def of_server(server: Server) -> Target:
        return Target.of(server.checkpoint, server.node.peer_id, server.node.addresses())


@dataclass(eq=False)
class Opened:
    """A session at the target, seen from its client. `upstream` carries the steps."""

    target: Target
    session_id: bytes
    edge: int
    control: FrameStream
    sealer: EdgeSealer
    opener: EdgeOpener
    num_rows: int
    channel: ChannelSecret
    upstream: FrameStream | None = None
    numbers: dict[str, int] = field(default_factory=lambda: {"step": 0})

    def header(self, table: StepTable, **changes: Any) -> FrameHeader:
        """The right header of the next step, with `changes`."""
        fields: dict[str, Any] = {
            "session": self.session_id,
            "edge": self.edge,
            "step": self.numbers["step"],
            "position": table.rows[0].start if table.rows else 0,
            "num_tokens": table.num_tokens,
            "span_start": 0,
            "span_end": self.target.num_blocks,
            "dtype": WireDtype.FLOAT32,
            "shape": (table.num_tokens, self.target.hidden_size),
        }
        return FrameHeader(FrameType.STEP, **{**fields, **changes})

    def sealed(
        self, table: StepTable, hidden_TD: torch.Tensor, **changes: Any
    ) -> tuple[FrameHeader, bytes]:
        """A step frame sealed with the right key, whatever its header says."""
        return self.seal(self.header(table, **changes), table.pack() + hidden_TD.numpy().tobytes())

    def seal(self, header: FrameHeader, plaintext: bytes) -> tuple[FrameHeader, bytes]:
        return self.sealer.seal(header, [plaintext], time.monotonic())

    def numbers_for(self, num_tokens: int, start: int = 0) -> tuple[StepTable, torch.Tensor]:
        """A step of row 0 and small random hidden states for it."""
        hidden_TD = torch.randn(num_tokens, self.target.hidden_size) * 0.02
        return StepTable((RowSlice(0, start, num_tokens),)), hidden_TD

    async def send(self, header: FrameHeader, payload: bytes) -> None:
        await (self.upstream or self.control).send(header, payload)

    async def step(self, num_tokens: int, start: int = 0) -> torch.Tensor:
        """An honest step; its answer."""
        table, hidden_TD = self.numbers_for(num_tokens, start)
        await self.send(*self.sealed(table, hidden_TD))
        self.numbers["step"] += 1
        return await self.answer()

    async def answer(self) -> torch.Tensor:
        """The next answer of the last hop, or what it reports instead."""
        header, payload = await self.control.receive(ANSWER_TIMEOUT_S)
        if header.type is FrameType.ERROR:
            raise reported(payload)
        plaintext = self.opener.open(header, payload)
        _, offset = unpack_answer_head(plaintext)
        return tensor_from_payload(plaintext, offset, header.dtype, header.shape)

    async def error(self) -> PlanetServeError:
        """The error with which the server ends the session."""
        return await error_on(self.control)

    async def close(self) -> None:
        for stream in (self.control, self.upstream):
            if stream is not None:
                stream.abort()


class Stranger:
    """A peer of the target's swarm."""

    def __init__(self, node: SwarmNode, target: Target):
        self.node = node
        self.target = target

    @classmethod
    async def join(cls, initial_peers: Sequence[str], target: Target) -> Stranger:
        config = NodeConfig(client_mode=True, initial_peers=tuple(initial_peers))
        return cls(await SwarmNode.start(config), target)

    async def stream(self, protocol: str = SESSION_PROTOCOL) -> FrameStream:
        target = self.target
        return await self.node.open_stream(target.peer_id, target.addresses, protocol, 20.0)

    def message(self, public_key: bytes, **changes: Any) -> OpenSession:
        """The right OPEN for a session of one hop, with `changes`."""
        target = self.target
        fields: dict[str, Any] = {
            "model": target.model,
            "fingerprint": target.fingerprint,
            "dtype": "float32",
            "start": 0,
            "end": target.num_blocks,
            "num_rows": 1,
            "max_length": 32,
            "edge": 0,
            "epoch": 0,
            "previous": CLIENT,
            "next": None,
            "first_step": 0,
            "offer": to_text(public_key),
        }
        return OpenSession.model_validate({**fields, **changes})

    async def open(
        self, session_id: bytes | None = None, *, edge_keys: bool = True, **changes: Any
    ) -> Opened:
        """Open a session; what the server refuses is raised."""
        session_id = session_id or os.urandom(16)
        edge = changes.get("edge", 0)
        handshake = ClientHandshake(session_id, edge, self.target.peer_id)
        message = self.message(handshake.offer, **changes)
        payload = message.encode()
        control = await self.stream()
        header = FrameHeader(FrameType.OPEN, session=session_id, edge=edge)
        try:
            await control.send(header, payload)
            answer, body = await control.receive(ANSWER_TIMEOUT_S)
            if answer.type is FrameType.ERROR:
                raise reported(body)
        except BaseException:
            control.abort()
            raise
        opened = decode(SessionOpened, body)
        channel = handshake.finish(payload, from_text(opened.answer), from_text(opened.signature))
        inbound, outbound = new_edge_secret(), new_edge_secret()
        epoch = message.epoch
        session = Opened(
            self.target,
            session_id,
            edge,
            control,
            EdgeSealer(inbound, session_id, edge, epoch, FORWARD, time.monotonic()),
            EdgeOpener(outbound, session_id, ANSWER_EDGE, epoch, FORWARD),
            message.num_rows,
            channel,
        )
        if edge_keys:
            blob = seal_edge_keys(channel, epoch, inbound, outbound)
            await control.send(dataclasses.replace(header, type=FrameType.EDGE_KEYS), blob)
        return session

    async def push(
        self, session_id: bytes, edge: int = 1, epoch: int = 0, *, of: Stranger | None = None
    ) -> FrameStream:
        """A push stream with its HELLO, into a session that `of` (or this peer) has opened."""
        stream = await self.stream(PUSH_PROTOCOL)
        hello = PushHello(client=(of or self).node.peer_id, edge=edge, epoch=epoch)
        header = FrameHeader(FrameType.HELLO, session=session_id, edge=edge, epoch=epoch)
        await stream.send(header, hello.encode())
        return stream

    def nowhere(self) -> NextHop:
        """A next hop that is not there."""
        return NextHop(peer_id=self.node.peer_id, edge=1, fresh=True, end=3, addresses=[])


MeetServer = Callable[[], Awaitable[Stranger]]
"""The fixture `meet`."""


async def error_on(stream: FrameStream) -> PlanetServeError:
    """The error with which the other end closes a stream; frames before it are skipped."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while True:
            try:
                header, payload = await stream.receive()
            except StreamClosed as error:
                return error
            if header.type is FrameType.ERROR:
                return reported(payload)


def reported(payload: bytes | bytearray) -> PlanetServeError:
    """The error that an ERROR frame stands for; `peer_id` is who it blames."""
    reply = decode(ErrorReply, payload)
    error = error_from_code(reply.code, reply.message, reply.retry_after_s)
    error.peer_id = reply.blamed_peer or None
    return error


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait for something that nobody signals."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
