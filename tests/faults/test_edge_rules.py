"""Each rule of an edge, broken once: a typed error, a count, nothing computed, others go on."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
import torch
from hostile import MeetServer, Opened, error_on, until

from planetserve.crypto.secrets import EDGE_KEYS_BYTES
from planetserve.errors import (
    CacheExhausted,
    DecryptionFailed,
    PlanetServeError,
    RemoteProtocolError,
    SessionError,
    SessionLengthError,
    StreamClosed,
    UnsupportedError,
)
from planetserve.server import handler as handler_module
from planetserve.server.server import Server
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    FLAG_REPLAY,
    MAX_STEP_BYTES,
    Direction,
    FrameHeader,
    FrameType,
    WireDtype,
)
from planetserve.wire.protocols import PUSH_PROTOCOL
from planetserve.wire.step import MAX_POSITION, HopLoad, RowSlice, StepTable

pytestmark = pytest.mark.asyncio(loop_scope="module")

Frame = tuple[FrameHeader, bytes]
BadFrame = Callable[[Opened], Frame]


def good(session: Opened, **changes: Any) -> Frame:
    return session.sealed(*session.numbers_for(2), **changes)


def changed_on_the_way(**changes: Any) -> BadFrame:
    def make(session: Opened) -> Frame:
        header, payload = good(session)
        return dataclasses.replace(header, **changes), payload

    return make


def changed_before_sealing(**changes: Any) -> BadFrame:
    return lambda session: good(session, **changes)


def with_payload(change: Callable[[bytes], bytes]) -> BadFrame:
    def make(session: Opened) -> Frame:
        header, payload = good(session)
        return header, change(payload)

    return make


def with_table(table: StepTable, num_tokens: int | None = None) -> BadFrame:
    """A table that is sealed as it is, with as many numbers as it or `num_tokens` says."""

    def make(session: Opened) -> Frame:
        count = table.num_tokens if num_tokens is None else num_tokens
        shape = (count, session.target.hidden_size)
        header = session.header(table, num_tokens=count, shape=shape)
        return session.seal(header, table.pack() + torch.zeros(shape).numpy().tobytes())

    return make


def with_plaintext(change: Callable[[bytes], bytes]) -> BadFrame:
    def make(session: Opened) -> Frame:
        table, hidden_TD = session.numbers_for(2)
        plaintext = table.pack() + hidden_TD.numpy().tobytes()
        return session.seal(session.header(table), change(plaintext))

    return make


def with_numbers(value: float) -> BadFrame:
    def make(session: Opened) -> Frame:
        table, hidden_TD = session.numbers_for(2)
        hidden_TD[1, 3] = value
        return session.sealed(table, hidden_TD)

    return make


def with_half_numbers(session: Opened) -> Frame:
    table, hidden_TD = session.numbers_for(2)
    return session.sealed(table, hidden_TD.half(), dtype=WireDtype.FLOAT16)


def with_width(extra: int) -> BadFrame:
    def make(session: Opened) -> Frame:
        table, _ = session.numbers_for(2)
        wide = torch.zeros(2, session.target.hidden_size + extra)
        return session.sealed(table, wide, shape=tuple(wide.shape))

    return make


def rows(*pieces: tuple[int, int, int], **more: Any) -> StepTable:
    return StepTable(tuple(RowSlice(*piece) for piece in pieces), **more)


NOT_OPENED: dict[str, BadFrame] = {
    "of another session": changed_on_the_way(session=os.urandom(16)),
    "of another edge": changed_on_the_way(edge=7),
    "of a later epoch": changed_on_the_way(epoch=1),
    "of the other direction": changed_on_the_way(direction=Direction.BACKWARD),
    "out of sequence": changed_on_the_way(sequence=2),
    "with a changed position": changed_on_the_way(position=1),
    "with changed flags": changed_on_the_way(flags=1),
    "with a changed bit": with_payload(lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "with a changed tag": with_payload(lambda data: data[:-1] + bytes([data[-1] ^ 128])),
    "cut short": with_payload(lambda data: data[:-1]),
    "with more at its end": with_payload(lambda data: data + b"\0"),
}

NOT_A_STEP: dict[str, BadFrame] = {
    "for other blocks": changed_before_sealing(span_end=1),
    "for blocks that nobody serves": changed_before_sealing(span_end=9),
    "of another dtype": with_half_numbers,
    "without a dtype": changed_before_sealing(dtype=WireDtype.NONE),
    "that is too wide": with_width(1),
    "that is too narrow": with_width(-1),
    "of three dimensions": lambda session: good(session, shape=(1, 2, session.target.hidden_size)),
    "without dimensions": changed_before_sealing(shape=()),
    "of fewer tokens than its table": changed_before_sealing(num_tokens=1),
    "of more tokens than its table": with_table(rows((0, 0, 2)), num_tokens=3),
    "at a position that is not its table's": changed_before_sealing(position=1),
    "without rows": with_table(StepTable(())),
    "of a row out of range": with_table(rows((1, 0, 2))),
    "of a row named twice": with_table(rows((0, 0, 1), (0, 1, 1))),
    "of an empty row": with_table(rows((0, 0, 0)), num_tokens=0),
    "past the largest position": with_table(rows((0, MAX_POSITION - 1, 2))),
    "with the loads of hops that there are not": with_table(
        rows((0, 0, 2), loads=(HopLoad(0, 5),) * 1000)
    ),
    "with a reorder of too many rows": with_table(rows((0, 0, 2), reorder=(0, 0))),
    "with a reorder of an unknown row": with_table(rows((0, 0, 2), reorder=(1,))),
    "with a negative position": with_table(rows((0, 0, 2), positions=(-1, 0))),
    "with unknown flags": with_plaintext(lambda data: b"\x80" + data[1:]),
    "with a tensor that is cut short": with_plaintext(lambda data: data[:-4]),
    "with more after its tensor": with_plaintext(lambda data: data + bytes(8)),
}

TOO_SHORT_FOR_THE_HEADER: dict[str, BadFrame] = {
    "with positions that are cut short": with_plaintext(lambda data: b"\x01" + data[1:20]),
    "with a table that is cut short": with_plaintext(lambda data: data[:7]),
    "with nothing in it": with_plaintext(lambda _: b""),
}
"""A bad header ends the stream at once, so the sender is told nothing."""

REFUSED_BY_THE_ENGINE: dict[str, tuple[BadFrame, type[PlanetServeError]]] = {
    "after a gap": (with_table(rows((0, 3, 2))), SessionError),
    "longer than the server allows": (with_table(rows((0, 0, 300))), SessionLengthError),
    "with NaN": (with_numbers(float("nan")), RemoteProtocolError),
    "with infinity": (with_numbers(float("-inf")), RemoteProtocolError),
}

ALL: dict[str, tuple[BadFrame, type[PlanetServeError]]] = {
    **{name: (make, DecryptionFailed) for name, make in NOT_OPENED.items()},
    **{name: (make, RemoteProtocolError) for name, make in NOT_A_STEP.items()},
    **{name: (make, StreamClosed) for name, make in TOO_SHORT_FOR_THE_HEADER.items()},
    **REFUSED_BY_THE_ENGINE,
}


@pytest_asyncio.fixture(loop_scope="module")
async def bystander(meet: MeetServer) -> Opened:
    """An honest session of somebody else, with some tokens in it."""
    session = await (await meet()).open()
    await session.step(3)
    return session


async def check_others(server: Server, bystander: Opened) -> None:
    """The bystander goes on, and apart from its session the server holds nothing."""
    await bystander.step(1, start=3)
    await until(lambda: server.handler.num_sessions == 1)
    assert server.engine.stats().num_sessions == 1
    await until(lambda: server.handler.queued_bytes == 0)
    await until(lambda: server.engine.stats().pages_used == 1)
    await bystander.close()


@pytest.mark.parametrize("name", ALL)
async def test_a_bad_frame_from_a_client(
    server: Server, meet: MeetServer, bystander: Opened, name: str
) -> None:
    make, kind = ALL[name]
    session = await (await meet()).open()
    await session.step(2)
    session.numbers["step"] = 1
    reason = f"session.{'protocol' if kind is StreamClosed else kind.code}"
    before, num_items = server.handler.counters[reason], server.engine._num_items
    await session.send(*make(session))
    assert type(await session.error()) is kind
    await until(lambda: server.handler.counters[reason] == before + 1)
    if name not in REFUSED_BY_THE_ENGINE:
        assert server.engine._num_items == num_items
    await check_others(server, bystander)


FROM_A_HOP = ("of another session", "out of sequence", "with a changed bit", "for other blocks",
              "of a row out of range", "with NaN", "after a gap")  # fmt: skip


@pytest.mark.parametrize("name", FROM_A_HOP)
async def test_a_bad_frame_from_a_hop(
    server: Server, meet: MeetServer, bystander: Opened, name: str
) -> None:
    """The client is told, and told whom the server blames."""
    make, kind = ALL[name]
    client, hop = await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id)
    session.upstream = await hop.push(session.session_id, of=client)
    await session.step(2)
    await session.send(*make(session))
    error = await session.error()
    assert type(error) is kind
    assert error.peer_id == hop.node.peer_id
    await check_others(server, bystander)


OUT_OF_ORDER: dict[str, dict[str, Any]] = {
    "a later step": {"step": 10},
    "an earlier step": {"step": 0},
    "a step that begins in its middle": {"chunk": 1, "num_chunks": 2},
    "a replay in the middle of a text": {"flags": FLAG_REPLAY},
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
async def test_a_step_that_does_not_follow_is_refused_and_not_passed_on(
    server: Server, meet: MeetServer, bystander: Opened, name: str
) -> None:
    """Or the client would blame the hop that passes on what another one has altered."""
    client, hop = await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id)
    session.upstream = await hop.push(session.session_id, of=client)
    await session.step(2)
    table, hidden_TD = session.numbers_for(1, start=2)
    num_items = server.engine._num_items
    await session.send(*session.sealed(table, hidden_TD, **OUT_OF_ORDER[name]))
    error = await session.error()
    assert type(error) is RemoteProtocolError
    assert error.peer_id == hop.node.peer_id
    assert server.engine._num_items == num_items
    await check_others(server, bystander)


async def test_the_first_step_is_the_one_that_the_client_named(
    server: Server, meet: MeetServer, bystander: Opened
) -> None:
    client, hop = await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id, first_step=3)
    session.upstream = await hop.push(session.session_id, of=client)
    await session.send(*good(session, step=12))
    error = await session.error()
    assert (type(error), error.peer_id) == (RemoteProtocolError, hop.node.peer_id)
    await check_others(server, bystander)


@pytest.mark.parametrize("changes", [{"flags": 0}, {"num_chunks": 3}, {"step": 2}])
async def test_chunks_of_one_step_agree(
    server: Server, meet: MeetServer, bystander: Opened, changes: dict[str, Any]
) -> None:
    client, hop = await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id)
    session.upstream = await hop.push(session.session_id, of=client)
    for chunk, more in enumerate(({}, changes)):
        table, hidden_TD = session.numbers_for(2, start=2 * chunk)
        right = {"chunk": chunk, "num_chunks": 2, "flags": FLAG_KEEP_LAST}
        await session.send(*session.sealed(table, hidden_TD, **{**right, **more}))
    error = await session.error()
    assert (type(error), error.peer_id) == (RemoteProtocolError, hop.node.peer_id)
    await check_others(server, bystander)


async def test_a_full_server_does_not_blame_the_hop_before(
    server: Server, meet: MeetServer, bystander: Opened
) -> None:
    client, hop = await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id, max_length=16)
    rest = await client.open(max_length=240)  # with it all that one peer may hold
    session.upstream = await hop.push(session.session_id, of=client)
    await session.send(*session.sealed(*session.numbers_for(40)))
    error = await session.error()
    assert type(error) is CacheExhausted
    assert error.peer_id is None
    await rest.close()
    await check_others(server, bystander)


async def test_a_repeated_frame(server: Server, meet: MeetServer, bystander: Opened) -> None:
    session = await (await meet()).open()
    frame = good(session)
    await session.send(*frame)
    await session.answer()
    await session.send(*frame)
    assert isinstance(await session.error(), DecryptionFailed)
    await check_others(server, bystander)


OTHER_TYPES = [kind for kind in FrameType if kind not in (FrameType.STEP, FrameType.CLOSE)]


@pytest.mark.parametrize("kind", OTHER_TYPES)
async def test_a_frame_that_does_not_belong_here(
    server: Server, meet: MeetServer, bystander: Opened, kind: FrameType
) -> None:
    session = await (await meet()).open()
    await session.step(2)
    payload = os.urandom(EDGE_KEYS_BYTES) if kind is FrameType.EDGE_KEYS else b"{}"
    await session.send(FrameHeader(kind, session=session.session_id), payload)
    error = await session.error()
    assert isinstance(error, DecryptionFailed | RemoteProtocolError)
    await check_others(server, bystander)


async def test_a_step_before_the_edge_keys(
    server: Server, meet: MeetServer, bystander: Opened
) -> None:
    session = await (await meet()).open(edge_keys=False)
    await session.send(*good(session))
    assert isinstance(await session.error(), RemoteProtocolError)
    await check_others(server, bystander)


@pytest.mark.parametrize("size", [0, 15, EDGE_KEYS_BYTES, EDGE_KEYS_BYTES + 1])
async def test_forged_edge_keys(
    server: Server, meet: MeetServer, bystander: Opened, size: int
) -> None:
    session = await (await meet()).open(edge_keys=False)
    await session.send(
        FrameHeader(FrameType.EDGE_KEYS, session=session.session_id), os.urandom(size)
    )
    assert isinstance(await session.error(), DecryptionFailed)
    await check_others(server, bystander)


def packed(**changes: Any) -> bytes:
    """A header with fields that `FrameHeader` would not pack."""
    header = bytearray(FrameHeader(FrameType.STEP, num_chunks=1).pack())
    for name, value in changes.items():
        offset, form = {
            "version": (0, ">B"), "type": (1, ">B"), "flags": (2, ">H"), "direction": (22, ">B"),
            "zero": (23, ">B"), "dtype": (52, ">B"), "codec": (53, ">B"), "num_dims": (54, ">B"),
            "dim0": (56, ">I"), "dim1": (60, ">I"), "dim2": (64, ">I"), "dim3": (68, ">I"),
            "chunk": (72, ">H"), "num_chunks": (74, ">H"), "payload_bytes": (76, ">I"),
        }[name]  # fmt: skip
        struct.pack_into(form, header, offset, value)
    return bytes(header)


BAD_HEADERS = {
    "oversize": packed(payload_bytes=MAX_STEP_BYTES + 1),
    "longest payload": packed(payload_bytes=2**32 - 1),
    "oversize control frame": packed(type=FrameType.OPEN, payload_bytes=64 * 1024 + 1),
    "unknown type": packed(type=99),
    "unknown dtype": packed(dtype=7),
    "unknown direction": packed(direction=2),
    "other codec": packed(codec=1),
    "unknown flag": packed(flags=4),
    "padding": packed(zero=1),
    "many dimensions": packed(num_dims=200),
    "tensor longer than its payload": packed(dtype=1, num_dims=2, dim0=2**16, dim1=2**16),
    "product past 64 bits": packed(dtype=1, num_dims=4, dim0=2**31, dim1=2**31, dim2=2**31, dim3=4),
    "chunk past the last": packed(chunk=3, num_chunks=3),
    "no chunks": packed(num_chunks=0),
}
OTHER_VERSIONS = {
    "other version": packed(version=2),
    "another protocol": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(80),
}


@pytest.mark.parametrize("name", [*BAD_HEADERS, *OTHER_VERSIONS])
async def test_a_bad_header(server: Server, meet: MeetServer, bystander: Opened, name: str) -> None:
    """In a session and as a first frame; what follows it on the stream is not read.

    A peer of another version is told so, which may be all that it needs to know.
    """
    header = (BAD_HEADERS | OTHER_VERSIONS)[name]
    reason = "session.unsupported" if name in OTHER_VERSIONS else "session.protocol"
    first = UnsupportedError if name in OTHER_VERSIONS else StreamClosed
    stranger = await meet()
    session = await stranger.open()
    await session.step(2)
    before = server.handler.counters.copy()
    await asyncio.get_running_loop().sock_sendall(session.control._socket, header)
    assert isinstance(await session.error(), RemoteProtocolError | StreamClosed)
    await until(lambda: server.handler.counters[reason] > before[reason])
    for protocol in (None, PUSH_PROTOCOL):
        before = server.handler.counters.copy()
        stream = await (stranger.stream(protocol) if protocol else stranger.stream())
        await asyncio.get_running_loop().sock_sendall(stream._socket, header)
        assert type(await error_on(stream)) is first
        await until(lambda: server.handler.counters["frame"] > before["frame"])  # noqa: B023
    await check_others(server, bystander)


async def test_a_push_from_the_wrong_peer(
    server: Server, meet: MeetServer, bystander: Opened
) -> None:
    client, hop, stranger = await meet(), await meet(), await meet()
    session = await client.open(edge=1, previous=hop.node.peer_id)
    before = server.handler.counters["push.mismatch"]
    for peer, epoch in ((stranger, 0), (client, 0), (hop, 1)):
        refused = await peer.push(session.session_id, epoch=epoch, of=client)
        assert isinstance(await error_on(refused), RemoteProtocolError)
    assert server.handler.counters["push.mismatch"] == before + 3
    session.upstream = await hop.push(session.session_id, of=client)
    assert (await session.step(2)).shape == (2, session.target.hidden_size)
    second = await hop.push(session.session_id, of=client)
    assert isinstance(await error_on(second), RemoteProtocolError)
    assert (await session.step(1, start=2)).shape == (1, session.target.hidden_size)
    await session.close()
    await check_others(server, bystander)


async def test_a_push_into_a_first_hop(server: Server, meet: MeetServer, bystander: Opened) -> None:
    stranger = await meet()
    session = await stranger.open()
    for edge in (1, 5):
        before = server.handler.counters["push.unknown"]
        pushes = [await stranger.push(session.session_id, edge) for _ in range(2)]
        # One of them waits for its OPEN; the other is one too many.
        errors = [error_on(stream) for stream in pushes]
        done, waiting = await asyncio.wait(
            [asyncio.create_task(error) for error in errors], return_when=asyncio.FIRST_COMPLETED
        )
        assert isinstance(done.pop().result(), RemoteProtocolError)
        assert server.handler.counters["push.unknown"] == before + 1
        for stream in pushes:
            stream.abort()
        await asyncio.gather(*waiting)
    await session.step(1)
    await session.close()
    await check_others(server, bystander)


async def test_a_stranger_who_says_hello_first_keeps_nobody_out(
    server: Server, meet: MeetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, hop, stranger = await meet(), await meet(), await meet()
    session_id = os.urandom(16)
    monkeypatch.setattr(handler_module, "_FIRST_FRAME_TIMEOUT_S", 3.0)

    def waiting() -> list[str]:
        return [peer for key, peer in server.handler._waiting if key[1] == session_id]

    early = await stranger.push(session_id, of=client)
    await until(lambda: waiting() == [stranger.node.peer_id])
    upstream = await hop.push(session_id, of=client)
    await until(lambda: len(waiting()) == 2)
    session = await client.open(session_id, edge=1, previous=hop.node.peer_id)
    session.upstream = upstream
    assert (await session.step(2)).shape[0] == 2
    assert isinstance(await error_on(early), RemoteProtocolError)
    await session.close()
    await until(lambda: not server.handler.num_sessions and not server.handler._waiting)


async def test_one_peer_has_so_many_pushes_waiting(
    server: Server, meet: MeetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = await meet()
    monkeypatch.setattr(handler_module, "_FIRST_FRAME_TIMEOUT_S", 3.0)
    most = handler_module._MAX_WAITING_PUSHES_PER_PEER
    await until(lambda: not server.handler._waiting)
    streams = [await stranger.push(os.urandom(16)) for _ in range(most)]
    await until(lambda: len(server.handler._waiting) == most)
    before = server.handler.counters["push.unknown"]
    streams.append(await stranger.push(os.urandom(16)))
    assert isinstance(await error_on(streams[-1]), RemoteProtocolError)
    assert server.handler.counters["push.unknown"] == before + 1
    for stream in streams:
        stream.abort()
    await until(lambda: not server.handler._waiting)
