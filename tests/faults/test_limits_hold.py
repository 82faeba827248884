"""A peer that wants too much is refused at once and told when to come back; others go on.

Whatever takes the engine's time or memory is real; the engine is held up by a posted command where
a test must show that nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from hostile import MeetServer, Opened, Stranger, Target, error_on, until

from planetserve.crypto.handshake import ClientHandshake
from planetserve.errors import (
    CacheExhausted,
    HandshakeFailed,
    PlanetServeError,
    QueueFull,
    RemoteProtocolError,
    StreamClosed,
)
from planetserve.server.server import Server
from planetserve.testing.swarm import LocalSwarm
from planetserve.types import PeerId
from planetserve.wire.frame import MAX_STEP_BYTES, FrameHeader, FrameType
from planetserve.wire.step import StepTable

pytestmark = pytest.mark.asyncio(loop_scope="module")

CACHE_TOKENS = 1 << 16
OPTIONS = {
    "attn_cache_tokens": CACHE_TOKENS,
    "inference_max_length": CACHE_TOKENS,
    "max_peer_opens": 1,
    "peer_open_burst": 24,
    "max_peer_sessions": 12,
    "max_peer_queued_mib": 1,
    "max_peer_kv_share": 0.25,
    "kv_overcommit": 1.0,
}


@pytest.fixture(scope="module")
def swarm(llama_folder: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(llama_folder), ["0:2"], OPTIONS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def meet(swarm: LocalSwarm, server: Server) -> AsyncIterator[MeetServer]:
    """Strangers with peer ids of their own: how often one has asked stays with its id."""
    strangers: list[Stranger] = []

    async def meet() -> Stranger:
        strangers.append(await Stranger.join(swarm.initial_peers, Target.of_server(server)))
        return strangers[-1]

    yield meet
    for stranger in strangers:
        await stranger.node.close()
    await until(lambda: not server.handler.num_sessions)
    assert server.handler.queued_bytes == 0


@pytest.fixture
def engine_held_up(server: Server) -> Iterator[threading.Event]:
    """The engine thread does nothing until the event is set."""
    go_on = threading.Event()
    server.engine._worker.post(lambda: go_on.wait(60) and None)
    yield go_on
    go_on.set()


async def refusal(stranger: Stranger, **changes: object) -> PlanetServeError:
    with pytest.raises(PlanetServeError) as caught:
        await stranger.open(**changes)  # type: ignore[arg-type]
    return caught.value


async def test_a_peer_may_hold_so_many_sessions(server: Server, meet: MeetServer) -> None:
    greedy, other = await meet(), await meet()
    sessions = [await greedy.open() for _ in range(OPTIONS["max_peer_sessions"])]
    error = await refusal(greedy)
    assert isinstance(error, QueueFull)
    assert error.retry_after_s > 0
    assert (await (await other.open()).step(1)).shape[0] == 1
    await sessions[0].close()
    await until(lambda: server.handler.num_sessions == OPTIONS["max_peer_sessions"])
    await greedy.open()


async def test_sessions_that_are_opened_at_once_are_counted_as_well(
    server: Server, meet: MeetServer
) -> None:
    """Their OPENs arrive header by header, when none of them is open, and then the rest."""
    greedy = await meet()
    most = OPTIONS["max_peer_sessions"]
    streams, payloads = [], []
    for number in range(most + 4):
        payload = greedy.message(ClientHandshake(bytes(16), 0, server.node.peer_id).offer).encode()
        header = FrameHeader(
            FrameType.OPEN, session=bytes([number] * 16), payload_bytes=len(payload)
        )
        streams.append(await greedy.stream())
        await asyncio.get_running_loop().sock_sendall(streams[-1]._socket, header.pack())
        payloads.append(payload)
    await until(lambda: all_headers_read(server, len(streams)))
    for stream, payload in zip(streams, payloads, strict=True):
        await asyncio.get_running_loop().sock_sendall(stream._socket, payload)
    answers = [(await stream.receive(10.0))[0].type for stream in streams]
    assert answers.count(FrameType.OPENED) == most
    assert answers.count(FrameType.ERROR) == 4
    for stream in streams:
        stream.abort()


def all_headers_read(server: Server, count: int) -> bool:
    return sum(stream._header is not None for stream in server.node.streams) == count


async def test_a_peer_may_open_sessions_at_a_rate(server: Server, meet: MeetServer) -> None:
    greedy, other = await meet(), await meet()
    before = server.handler.counters["open.queue_full"]
    for _ in range(OPTIONS["peer_open_burst"]):
        session = await greedy.open()
        await session.close()
    error = await refusal(greedy)
    assert isinstance(error, QueueFull)
    # One a minute, of which some seconds have passed.
    assert 0 < error.retry_after_s <= 60
    assert server.handler.counters["open.queue_full"] == before + 1
    assert (await (await other.open()).step(1)).shape[0] == 1


async def test_refused_attempts_count_as_well(server: Server, meet: MeetServer) -> None:
    greedy = await meet()
    for _ in range(OPTIONS["peer_open_burst"]):
        # A point of low order: no key comes of it.
        with pytest.raises(HandshakeFailed):
            await greedy.open(offer="A" * 43 + "=")
    assert isinstance(await refusal(greedy), QueueFull)
    assert server.handler.counters["open.handshake"] >= OPTIONS["peer_open_burst"]


async def test_a_full_cache_refuses_without_waiting_for_the_engine(
    server: Server, meet: MeetServer, engine_held_up: threading.Event
) -> None:
    """F20: alone a peer gets everything, until others need their quarter."""
    greedy, modest, late = await meet(), await meet(), await meet()
    quarter = CACHE_TOKENS // 4
    sessions = [await greedy.open(max_length=quarter) for _ in range(4)]
    assert server.engine.stats().free_cache_tokens == 0
    for _ in range(10):
        # The engine thread is held up: an answer proves that nobody asked it.
        error = await refusal(greedy, max_length=16)
        assert isinstance(error, CacheExhausted)
        assert error.retry_after_s > 0
    small = await modest.open(max_length=quarter // 2)
    newest = await sessions.pop().error()
    assert isinstance(newest, CacheExhausted)
    assert newest.retry_after_s > 0
    assert isinstance(await refusal(greedy, max_length=16), CacheExhausted)
    assert isinstance(await refusal(modest, max_length=quarter), CacheExhausted)
    assert isinstance(await refusal(late, max_length=64, num_rows=1024), CacheExhausted)
    smaller = await late.open(max_length=quarter // 2)
    assert server.engine.stats().free_cache_tokens == 0
    engine_held_up.set()
    for session in (small, smaller, *sessions):
        assert (await session.step(3)).shape[0] == 3
        await session.close()
    await until(lambda: server.engine.stats().pages_leased == 0)
    await until(lambda: server.engine.stats().pages_used == 0)


async def test_what_is_queued_is_bounded_and_stops_its_own_producer_only(
    server: Server, meet: MeetServer, engine_held_up: threading.Event
) -> None:
    greedy, modest = await meet(), await meet()
    limit = OPTIONS["max_peer_queued_mib"] << 20
    num_tokens = 512
    # The engine takes no more tokens of a session than it has leased.
    sessions = [await greedy.open(max_length=CACHE_TOKENS // 8) for _ in range(6)]
    frame_bytes = num_tokens * server.checkpoint.config.hidden_size * 4
    num_frames = 2 * limit // (frame_bytes * len(sessions))
    senders = [asyncio.create_task(send_steps(item, num_tokens, num_frames)) for item in sessions]
    await until(lambda: server.handler.queued_bytes > limit - 2 * frame_bytes)
    session = await modest.open()
    answer = asyncio.create_task(session.step(2))
    first, items = server.handler.queued_bytes, server.engine._num_items
    await until(lambda: server.handler.queued_bytes > first or server.engine._num_items > items)
    assert server.handler._gate.queued.of(greedy.node.peer_id) <= limit
    assert server.handler._gate.queued.of(modest.node.peer_id) > 0
    engine_held_up.set()
    assert (await answer).shape[0] == 2
    for item, sender in zip(sessions, senders, strict=True):
        for _ in range(num_frames):
            assert (await item.answer()).shape[0] == num_tokens
        await sender
    await until(lambda: server.handler.queued_bytes == 0)


async def test_a_frame_is_read_when_there_is_room_for_it_and_not_before(
    server: Server, meet: MeetServer, engine_held_up: threading.Event
) -> None:
    """Every session of a peer announces as much as a frame may hold; the rest stays in the network,
    and one header does not take the place of many."""
    greedy, modest = await meet(), await meet()
    limit = OPTIONS["max_peer_queued_mib"] << 20
    sessions = [await greedy.open(max_length=CACHE_TOKENS // 16) for _ in range(8)]
    width_bytes = server.checkpoint.config.hidden_size * 4
    num_tokens = (MAX_STEP_BYTES - (64 << 10)) // (width_bytes + 4)
    table, hidden_TD = sessions[0].numbers_for(num_tokens)
    before = sum(stream.bytes_received for stream in server.node.streams)
    senders = [asyncio.create_task(send(item, table, hidden_TD)) for item in sessions]
    gate, peer = server.handler._gate, greedy.node.peer_id
    await until(lambda: len(gate._waiting.get(peer, ())) == len(sessions) - 1)
    assert gate.queued.of(peer) <= MAX_STEP_BYTES
    received = sum(stream.bytes_received for stream in server.node.streams) - before
    # One frame, which a peer with nothing queued may always send, and what came with the headers.
    assert received < MAX_STEP_BYTES + len(sessions) * (64 << 10) + limit
    answer = asyncio.create_task((await modest.open()).step(2))
    await until(lambda: gate.queued.of(modest.node.peer_id))
    for session in sessions:
        await session.close()
    await asyncio.gather(*senders)
    engine_held_up.set()
    assert (await answer).shape[0] == 2
    await until(lambda: not server.handler.queued_bytes and not gate._waiting)


async def send(session: Opened, table: StepTable, hidden_TD: torch.Tensor) -> None:
    with contextlib.suppress(StreamClosed):
        await session.send(*session.sealed(table, hidden_TD))


WRONG_SIZES: dict[str, dict[str, object]] = {
    "one token in the longest payload": {},
    "a step instead of OPEN": {},
    "no tensor": {"shape": ()},
    "other blocks": {"span_end": 1},
}


@pytest.mark.parametrize("name", WRONG_SIZES)
async def test_what_cannot_be_right_is_refused_by_its_header(
    server: Server, meet: MeetServer, name: str
) -> None:
    stranger = await meet()
    if name == "a step instead of OPEN":
        stream = await stranger.stream()
        header = FrameHeader(FrameType.STEP, session=bytes(16))
    else:
        session = await stranger.open()
        stream = session.control
        header = session.header(session.numbers_for(1)[0], **WRONG_SIZES[name])
    announced = dataclasses.replace(header, payload_bytes=MAX_STEP_BYTES)
    # Nothing follows the header, so the answer proves that nothing was waited for.
    stream._socket.send(announced.pack())
    assert isinstance(await error_on(stream), RemoteProtocolError)


async def test_chunks_that_are_held_for_a_whole_step_are_within_the_lease(
    server: Server, meet: MeetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine cannot take steps in parts: they count at the gate, and end at the lease."""
    monkeypatch.setattr(server.engine.runner, "chunkable", False)
    honest, greedy, other = await meet(), await meet(), await meet()
    session = await honest.open(max_length=64)
    for chunk in range(4):
        table, hidden_TD = session.numbers_for(16, start=16 * chunk)
        await session.send(*session.sealed(table, hidden_TD, chunk=chunk, num_chunks=4))
        if chunk == 2:
            await until(lambda: server.handler.queued_bytes >= 3 * hidden_TD.nbytes)  # noqa: B023
    for _ in range(4):
        assert (await session.answer()).shape[0] == 16
    rest = await other.open(max_length=CACHE_TOKENS // 4)
    most = CACHE_TOKENS // 4  # of one peer, while another holds some
    hoard = await greedy.open(max_length=most - 64)
    num_tokens, num_sent = 2048, 0

    async def fill() -> None:
        nonlocal num_sent
        for chunk in range(64):
            table, hidden_TD = hoard.numbers_for(num_tokens, start=num_tokens * chunk)
            await hoard.send(*hoard.sealed(table, hidden_TD, chunk=chunk, num_chunks=64))
            num_sent += 1

    filling = asyncio.create_task(fill())
    assert isinstance(await hoard.error(), CacheExhausted)
    assert server.handler.queued_bytes == 0
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    assert num_sent <= 2 * most // num_tokens
    await rest.close()


async def test_a_journal_keeps_no_more_than_the_lease(server: Server, meet: MeetServer) -> None:
    """One endless step that takes itself back would be kept whole for a next hop."""
    greedy = await meet()
    session = await greedy.open(max_length=64, next=greedy.nowhere())
    table, hidden_TD = session.numbers_for(64)
    await session.send(*session.sealed(table, hidden_TD, num_chunks=65535))
    await until(lambda: server.handler.replay_bytes == hidden_TD.nbytes)
    await session.send(*session.sealed(table, hidden_TD, chunk=1, num_chunks=65535))
    assert isinstance(await session.error(), RemoteProtocolError)
    await until(lambda: not server.handler.num_sessions)
    assert server.handler.replay_bytes == 0


async def send_steps(session: Opened, num_tokens: int, count: int) -> None:
    """Send steps that start over each time, without waiting for an answer."""
    table, _ = session.numbers_for(num_tokens)
    hidden_TD = torch.zeros(num_tokens, session.target.hidden_size)
    for number in range(count):
        await session.send(*session.sealed(table, hidden_TD, step=number))


async def test_questions_do_not_keep_the_server_busy(server: Server, meet: MeetServer) -> None:
    """Many come in one piece; they are answered now and then, and others go on meanwhile."""
    curious, other = await meet(), await meet()
    num_questions, num_answers = 500, 0

    def tap(way: str, remote: PeerId, header: FrameHeader) -> None:
        nonlocal num_answers
        num_answers += (way, header.type) == ("sent", FrameType.STATUS)

    asking, working = await curious.open(), await other.open()
    header = FrameHeader(FrameType.STATUS, session=asking.session_id)
    server.node.taps.append(tap)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(asking.control._socket, num_questions * header.pack())
    await until(lambda: num_answers)
    for position in range(10):
        assert (await working.step(1, start=position)).shape[0] == 1
    assert num_answers < num_questions
    server.node.taps.remove(tap)
    await asking.close()
    await working.close()
