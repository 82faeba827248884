"""What a server may do to the client that uses it: cost it a fail-over, no memory and no token.

The server here keeps to the handshake and then sends what nobody asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fault_swarm import FaultSwarm, Held, Host, Moment
from faulted_texts import GREEDY, Material

from planetserve.client.ring.hop_connection import LEAST_CHUNK_TOKENS, MAX_UNREAD
from planetserve.edge.chunk import StepChunk
from planetserve.errors import (
    CapacityError,
    ConfigError,
    DecryptionFailed,
    LocalProtocolError,
    PeerUnreachable,
    PlanetServeError,
    RefusedByServers,
    RemoteError,
    RemoteProtocolError,
    SessionClosed,
    SessionError,
)
from planetserve.server.downstream import Downstream
from planetserve.server.session import ServerSession
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.types import PeerId
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY, FrameHeader, FrameType
from planetserve.wire.messages import ErrorReply, SessionOpened, error_reply

pytestmark = pytest.mark.timeout(120)

SPANS = ("0:3", "0:3", "3:6", "3:6")
NUM_FRAMES = 400


def step(session_id: bytes, accused: PeerId) -> tuple[FrameHeader, bytes]:
    """An answer of the largest size that every stream takes at once, of noise."""
    return FrameHeader(FrameType.STEP, session=session_id), bytes(60 * 1024)


def complaint(session_id: bytes, accused: PeerId) -> tuple[FrameHeader, bytes]:
    payload = error_reply(PeerUnreachable("gone"), accused).encode()
    return FrameHeader(FrameType.NEXT_HOP_LOST, session=session_id), payload


@pytest.mark.parametrize("make", [step, complaint])
@pytest.mark.parametrize("first_block", [0, 3])
def test_a_flood_between_two_texts(
    repaired_swarm: FaultSwarm,
    material: Material,
    make: Callable[[bytes, PeerId], tuple[FrameHeader, bytes]],
    first_block: int,
) -> None:
    """The client takes in a bounded number of frames, and goes on without this server, or without
    the pair if it says that another one is at fault: which of them lies, nobody can tell."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **{**GREEDY, "max_new_tokens": 12})
    num_received = 0

    def tap(way: str, remote: PeerId, header: FrameHeader) -> None:
        nonlocal num_received
        num_received += (way, remote) == ("received", host.server.node.peer_id)

    with swarm.client() as model, model.inference_session(max_length=100):
        first = model.generate(material.prompt, **{**GREEDY, "max_new_tokens": 6})
        host = swarm.runs[first_block]
        (session,) = host.server.handler._sessions.values()
        accused = swarm.runs[3].server.node.peer_id
        frame = make(session.session_id, accused)

        async def flood() -> None:
            with contextlib.suppress(PlanetServeError):
                for _ in range(NUM_FRAMES):
                    await session._reports.stream.send(*frame)

        async def begin() -> None:
            swarm.spawn(flood())

        model.runtime.node.taps.append(tap)
        swarm.local.call(begin())
        before = -1
        while num_received > before:
            before = num_received
            time.sleep(0.5)
        # The last one has been read and is not in the inbox yet.
        assert num_received == MAX_UNREAD + 1
        second = model.generate(None, **{**GREEDY, "max_new_tokens": 6})
        assert model.chain is not None
        suspects = {host.server.node.peer_id}
        if make is complaint and first_block == 0:
            suspects.add(accused)
        assert not suspects <= {hop.peer_id for hop in model.chain}
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert swarm.leaked() == Held.nothing()


LIES = (DecryptionFailed, RemoteProtocolError, RemoteError, SessionError, PeerUnreachable)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("first_block", [0, 3])
def test_a_lie_about_a_neighbour_takes_no_server_from_the_client(
    repaired_swarm: FaultSwarm, material: Material, lie: type[PlanetServeError], first_block: int
) -> None:
    """A hop ends the session and says that it was its neighbour. The text goes on, the two are not
    side by side for a while, and neither of them is left out."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **GREEDY)

    def accuse(swarm: FaultSwarm, host: Host) -> None:
        (session,) = host.server.handler._sessions.values()
        error = lie("it was not me")
        error.peer_id = swarm.runs[3 - first_block].server.node.peer_id
        pairs.append({host.server.node.peer_id, error.peer_id})
        session.fail(error)

    pairs: list[set[PeerId]] = []
    with swarm.client(ban_timeout=60.0) as model:
        # Nothing has reached the second hop when the first gets the first step.
        fault = swarm.strike_at(Moment(first_block, step=2), accuse)
        text = model.generate(material.prompt, **GREEDY)
        assert fault.struck_s is not None
        manager = model.runtime._manager
        assert not manager.peers.banned()
        assert [set(pair) for pair in manager.peers.avoided_edges()] == pairs
        assert not pairs[0] <= {hop.peer_id for hop in model.chain}
    assert torch.equal(text, whole)
    assert swarm.leaked() == Held.nothing()


CODES = ("config", "session_closed", "no_chain", "capacity", "protocol", "made_up")


@pytest.mark.parametrize("code", CODES)
def test_who_refuses_a_session_speaks_for_itself(
    repaired_swarm: FaultSwarm,
    material: Material,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    """Before there is a session, a server cannot have seen anything of another: whomever it blames,
    it is the one to be left out."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **GREEDY)
    liar, blamed = swarm.hosts[0].server, swarm.hosts[2].server.node.peer_id
    refused: list[PeerId] = []

    def admit(*args: Any) -> tuple[ServerSession, SessionOpened]:
        if refused:
            return honest(*args)
        raise RemoteError("it is not my fault")

    async def refuse(
        stream: FrameStream, header: FrameHeader, error: PlanetServeError, reason: str
    ) -> None:
        refused.append(stream.remote)
        reply = FrameHeader(FrameType.ERROR, session=header.session, edge=header.edge)
        report = ErrorReply(code=code, retry_after_s=3600.0, blamed_peer=blamed)
        await stream.send(reply, report.encode())

    honest = liar.handler._admit
    monkeypatch.setattr(liar.handler, "_admit", admit)
    monkeypatch.setattr(liar.handler, "_refuse", refuse)
    with swarm.client(
        ban_timeout=60.0, blocked_servers=[swarm.hosts[1].server.node.peer_id]
    ) as model:
        assert torch.equal(model.generate(material.prompt, **GREEDY), whole)
        assert len(refused) == 1
        assert blamed not in model.runtime._manager.peers.banned()
    assert swarm.leaked() == Held.nothing()


def test_a_user_whom_all_servers_refuse_is_told_who_says_what(
    repaired_swarm: FaultSwarm, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = repaired_swarm

    def admit(*_: Any) -> tuple[ServerSession, SessionOpened]:
        raise ConfigError("run: curl evil.example")

    for host in swarm.hosts[:2]:
        monkeypatch.setattr(host.server.handler, "_admit", admit)
    with swarm.client(max_retries=1) as model:
        with pytest.raises(RefusedByServers) as caught:
            model.generate(material.prompt, **GREEDY)
    names = [host.server.node.peer_id[-6:] for host in swarm.hosts[:2]]
    assert all(f"…{name} says: 'config: " in str(caught.value) for name in names)
    assert "curl" not in str(caught.value), "only the code crosses the wire"
    assert swarm.leaked() == Held.nothing()


ENDS = (ConfigError, LocalProtocolError, SessionClosed, CapacityError, RemoteError)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("first_block", [0, 3])
def test_a_server_that_ends_a_session_ends_no_text(
    repaired_swarm: FaultSwarm, material: Material, end: type[PlanetServeError], first_block: int
) -> None:
    """Whatever it says of the reason, another one goes on and it is left out."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **GREEDY)

    def stop(_swarm: FaultSwarm, host: Host) -> None:
        (session,) = host.server.handler._sessions.values()
        session.fail(end("you did something wrong"))

    with swarm.client(ban_timeout=60.0) as model:
        fault = swarm.strike_at(Moment(first_block, step=2), stop)
        assert torch.equal(model.generate(material.prompt, **GREEDY), whole)
        assert fault.victim is not None
        assert model.runtime._manager.peers.banned() == [fault.victim.server.node.peer_id]
    assert swarm.leaked() == Held.nothing()


def later_step(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, step=chunk.step + 9)


def next_step(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, step=chunk.step + 1)


def all_tokens(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, flags=chunk.flags & ~FLAG_KEEP_LAST)


def last_tokens(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, flags=chunk.flags | FLAG_KEEP_LAST)


def as_replay(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, flags=chunk.flags | FLAG_REPLAY)


def one_chunk_more(chunk: StepChunk) -> StepChunk:
    return dataclasses.replace(chunk, num_chunks=chunk.num_chunks + 1)


ALTERED = (later_step, next_step, all_tokens, last_tokens, as_replay, one_chunk_more)


@pytest.mark.parametrize("first_step", [0, 2])
@pytest.mark.parametrize("alter", ALTERED)
def test_what_a_hop_alters_is_not_held_against_those_who_pass_it_on(
    repaired_swarm: FaultSwarm,
    material: Material,
    monkeypatch: pytest.MonkeyPatch,
    alter: Callable[[StepChunk], StepChunk],
    first_step: int,
) -> None:
    """A first hop changes what the last one repeats, in frames that are well sealed. The text goes
    on through the other first hop, and no honest server is left out."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **GREEDY)
    liar, *others = (host.server.node for host in swarm.hosts)
    send = Downstream._send

    async def alter_and_send(downstream: Downstream, target: FrameStream, chunk: StepChunk) -> None:
        if downstream._dials._node is liar and chunk.step >= first_step:
            chunk = alter(chunk)
        await send(downstream, target, chunk)

    monkeypatch.setattr(Downstream, "_send", alter_and_send)
    with swarm.client(ban_timeout=60.0, blocked_servers=[]) as model:
        assert torch.equal(model.generate(material.prompt, **GREEDY), whole)
        banned = model.runtime._manager.peers.banned()
        assert not set(banned) & {node.peer_id for node in others}
    assert swarm.leaked() == Held.nothing()


def test_a_hop_that_wants_single_tokens_gets_chunks(
    repaired_swarm: FaultSwarm, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt would become as slow as a text otherwise."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **GREEDY)
    for host in swarm.hosts:
        handler = host.server.handler
        narrow = dataclasses.replace(handler._limits, max_chunk_tokens=1)
        monkeypatch.setattr(handler, "_limits", narrow)
    num_sent = 0

    def tap(way: str, _remote: PeerId, header: FrameHeader) -> None:
        nonlocal num_sent
        num_sent += way == "sent" and header.type is FrameType.STEP and header.step == 0

    with swarm.client() as model:
        model.runtime.node.taps.append(tap)
        assert torch.equal(model.generate(material.prompt, **GREEDY), whole)
    assert num_sent == -(-material.prompt.shape[1] // LEAST_CHUNK_TOKENS)
