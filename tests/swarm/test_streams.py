"""Frame streams between real nodes, and on a bare socket pair where a peer must misbehave."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from swarm_helpers import LOOPBACK, until

from planetserve.crypto.identity import Identity
from planetserve.errors import (
    ConfigError,
    HopTimeout,
    LocalProtocolError,
    PeerUnreachable,
    RemoteProtocolError,
    StreamClosed,
    UnsupportedError,
)
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.libp2p.streams import MAX_LARGE_FRAMES_PER_PEER, FrameStream
from planetserve.wire.frame import MAX_CONTROL_BYTES, MAX_STEP_BYTES, FrameHeader, FrameType

pytestmark = pytest.mark.asyncio(loop_scope="module")

ECHO = "/test/echo/1"
STEP = FrameHeader(FrameType.STEP)


async def echo(stream: FrameStream) -> None:
    while True:
        header, payload = await stream.receive()
        await stream.send(header, payload)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[tuple[SwarmNode, SwarmNode]]:
    """An echo server and a client, shared by the tests of this module."""
    async with await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK)) as server:
        await server.serve_streams(ECHO, echo)
        config = NodeConfig(client_mode=True, initial_peers=server.addresses())
        async with await SwarmNode.start(config) as client:
            yield server, client


@pytest_asyncio.fixture(loop_scope="module")
async def server(nodes: tuple[SwarmNode, SwarmNode]) -> AsyncIterator[SwarmNode]:
    server, client = nodes
    yield server
    for stream in [*server.streams, *client.streams]:
        stream.abort()
    await until(lambda: not server.streams and not server._incoming.num_open)
    server.taps.clear()
    client.taps.clear()


@pytest.fixture
def client(nodes: tuple[SwarmNode, SwarmNode]) -> SwarmNode:
    return nodes[1]


@pytest_asyncio.fixture(params=["another node", "itself"], loop_scope="module")
async def stream(
    request: pytest.FixtureRequest, server: SwarmNode, client: SwarmNode
) -> FrameStream:
    """An open echo stream; a node may also open one to itself."""
    opener = server if request.param == "itself" else client
    return await opener.open_stream(server.peer_id, server.addresses(), ECHO, 10)


async def test_a_header_is_seen_before_its_payload_is_read(
    stream: FrameStream, server: SwarmNode
) -> None:
    payload = os.urandom(MAX_STEP_BYTES)
    sending = asyncio.create_task(stream.send(STEP, payload))
    for _ in range(2):
        header = await stream.peek(30)
        assert (header.type, header.payload_bytes) == (FrameType.STEP, len(payload))
    # What had come with the header, and no more.
    assert stream.bytes_received < 256 * 1024
    _, received = await stream.receive(30)
    await sending
    assert received == payload


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 100_000, MAX_STEP_BYTES])
async def test_frames_come_back_whole(stream: FrameStream, server: SwarmNode, size: int) -> None:
    payload = os.urandom(size)
    sent = FrameHeader(FrameType.STEP, session=os.urandom(16), sequence=5, position=9, num_tokens=2)
    for _ in range(3):
        await stream.send(sent, payload)
        header, received = await stream.receive(30)
        assert received == payload
        assert isinstance(received, bytearray)
        assert header == FrameHeader(
            FrameType.STEP, session=sent.session, sequence=5, position=9, num_tokens=2,
            payload_bytes=size,
        )  # fmt: skip
    assert stream.remote == server.peer_id
    await stream.close()
    assert stream.closed


async def test_a_payload_may_come_in_many_buffers(stream: FrameStream) -> None:
    pieces = [bytes([n % 256]) * 3000 for n in range(200)]
    buffers: list[Any] = [*pieces, b"", memoryview(b"abcdef")[::1], bytearray(b"xyz")]
    await stream.send(STEP, buffers)
    _, received = await stream.receive(30)
    assert received == b"".join(pieces) + b"abcdefxyz"


async def test_a_wide_memoryview_is_sent_as_its_bytes(stream: FrameStream) -> None:
    numbers = memoryview(bytearray(range(48))).cast("i", (3, 4))
    await stream.send(STEP, numbers)
    header, received = await stream.receive(30)
    assert (header.payload_bytes, received) == (48, bytearray(range(48)))


async def test_buffers_may_change_after_send(stream: FrameStream) -> None:
    buffer = bytearray(b"a" * (4 << 20))
    await stream.send(STEP, buffer)
    buffer[:] = b"b" * len(buffer)
    _, received = await stream.receive(30)
    assert received == b"a" * len(buffer)


async def test_concurrent_senders_do_not_interleave(stream: FrameStream) -> None:
    async def sender(number: int) -> None:
        for step in range(5):
            header = FrameHeader(FrameType.STEP, sequence=number, step=step)
            await stream.send(header, bytes([number]) * 300_000)

    seen = []
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(sender(number))
        for _ in range(40):
            header, payload = await stream.receive(30)
            assert payload == bytes([header.sequence]) * 300_000
            seen.append((header.sequence, header.step))
    assert sorted(seen) == [(number, step) for number in range(8) for step in range(5)]


async def test_taps_see_every_frame_on_both_sides(client: SwarmNode, server: SwarmNode) -> None:
    seen: list[tuple[str, str, str, int]] = []
    for name, node in (("client", client), ("server", server)):
        node.taps.append(lambda way, who, h, name=name: seen.append((name, way, who, h.sequence)))
    stream = await client.open_stream(server.peer_id, server.addresses(), ECHO, 10)
    await stream.send(FrameHeader(FrameType.STEP, sequence=3), b"x")
    await stream.receive(10)
    assert seen == [
        ("client", "sent", server.peer_id, 3),
        ("server", "received", client.peer_id, 3),
        ("server", "sent", client.peer_id, 3),
        ("client", "received", server.peer_id, 3),
    ]


async def test_the_last_frame_arrives_although_the_sender_never_read(
    client: SwarmNode, server: SwarmNode
) -> None:
    """A server that refuses a session closes while the client is still sending."""

    async def refuse(stream: FrameStream) -> None:
        await stream.receive()
        await asyncio.sleep(0.1)
        await stream.send(FrameHeader(FrameType.ERROR), b"go away")

    await server.serve_streams("/test/refuse/1", refuse)
    for _ in range(5):
        stream = await client.open_stream(server.peer_id, (), "/test/refuse/1", 10)

        async def flood(stream: FrameStream = stream) -> None:
            while True:
                await stream.send(STEP, bytes(100_000))

        flooding = asyncio.create_task(flood())
        header, payload = await stream.receive(10)
        assert (header.type, payload) == (FrameType.ERROR, b"go away")
        with pytest.raises(StreamClosed):
            await stream.receive(10)
        with pytest.raises(StreamClosed):
            await flooding


async def test_backpressure_reaches_the_sender(client: SwarmNode, server: SwarmNode) -> None:
    release = asyncio.Event()

    async def slow(stream: FrameStream) -> None:
        await release.wait()
        while True:
            await stream.receive()

    await server.serve_streams("/test/slow/1", slow)
    stream = await client.open_stream(server.peer_id, (), "/test/slow/1", 10)
    num_sent = 0

    async def flood() -> None:
        nonlocal num_sent
        while num_sent < 40:
            await stream.send(STEP, bytes(MAX_STEP_BYTES))
            num_sent += 1

    flooding = asyncio.create_task(flood())
    stalled_at = -1
    while num_sent != stalled_at:
        stalled_at = num_sent
        await asyncio.sleep(1.0)
    assert num_sent < 20, "a stream's windows hold tens of megabytes, not hundreds"
    assert not flooding.done()
    release.set()
    await flooding


async def test_close_wakes_whoever_waits(stream: FrameStream) -> None:
    waiting = asyncio.create_task(stream.receive())
    await asyncio.sleep(0.05)
    await stream.close()
    with pytest.raises(StreamClosed):
        await waiting
    await stream.close()
    with pytest.raises(StreamClosed):
        await stream.send(STEP)
    with pytest.raises(StreamClosed):
        await stream.receive()


async def test_the_end_of_the_handler_closes_the_stream(
    client: SwarmNode, server: SwarmNode, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: FrameStream) -> None:
        raise ValueError("the prompt was: my password is hunter2")

    await server.serve_streams("/test/fail/1", fail)
    stream = await client.open_stream(server.peer_id, (), "/test/fail/1", 10)
    with pytest.raises(StreamClosed):
        await stream.receive(10)
    assert "ValueError" in caplog.text
    assert "hunter2" not in caplog.text
    await until(lambda: not server.streams and not server._incoming.num_open)


async def test_closing_the_node_cancels_its_handlers(client: SwarmNode) -> None:
    server = await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK))
    cancelled = asyncio.Event()

    async def forever(stream: FrameStream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await server.serve_streams("/test/forever/1", forever)
    stream = await client.open_stream(server.peer_id, server.addresses(), "/test/forever/1", 10)
    await stream.send(STEP, b"hello")
    await until(lambda: bool(server.streams))
    await server.close()
    assert cancelled.is_set()
    assert not server.streams
    with pytest.raises(StreamClosed):
        await stream.receive(10)


async def test_a_closed_node_opens_nothing(server: SwarmNode) -> None:
    node = await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK))
    await node.serve_streams(ECHO, echo)
    await node.close()
    for peer_id in (node.peer_id, server.peer_id):
        with pytest.raises(PeerUnreachable, match="closed"):
            await node.open_stream(peer_id, server.addresses(), ECHO, 10)


async def test_streams_over_the_limit_are_closed_unheard(
    client: SwarmNode, server: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: not server._incoming.num_open)  # one may be the client's daemon's own
    monkeypatch.setattr(server._incoming, "max_streams", 8)
    streams = [await client.open_stream(server.peer_id, (), ECHO, 10) for _ in range(3)]
    answers = 0
    for stream in streams:
        try:
            await stream.send(STEP, b"x")
            await stream.receive(10)
            answers += 1
        except StreamClosed:
            pass
    assert answers == 2
    for stream in streams:
        await stream.close()
    await until(lambda: not server._incoming.num_open)
    again = await client.open_stream(server.peer_id, (), ECHO, 10)
    await again.send(STEP, b"x")
    await again.receive(10)


async def test_who_cannot_be_reached(client: SwarmNode, server: SwarmNode) -> None:
    nobody = Identity.generate().peer_id
    closed = f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}"
    impostor = server.addresses()[0].replace(server.peer_id, nobody)
    for addresses in ([], [closed], [impostor], ["/nonsense"], [server.addresses()[0]]):
        with pytest.raises(PeerUnreachable):
            await client.open_stream(nobody, addresses, ECHO, 10)
    with pytest.raises(PeerUnreachable, match="protocol"):
        await client.open_stream(server.peer_id, server.addresses(), "/test/unknown/1", 10)
    with pytest.raises(PeerUnreachable, match="cannot be dialled"):
        await client.open_stream("not a peer id", [], ECHO, 10)
    with pytest.raises(PeerUnreachable, match="does not serve"):
        await client.open_stream(client.peer_id, [], ECHO, 10)


async def test_a_peer_is_found_without_its_address(server: SwarmNode, client: SwarmNode) -> None:
    config = NodeConfig(host_maddrs=LOOPBACK, initial_peers=server.addresses())
    async with await SwarmNode.start(config) as third:
        await third.serve_streams(ECHO, echo)
        stream = await client.open_stream(third.peer_id, [], ECHO, 10)
        await stream.send(STEP, b"hi")
        assert (await stream.receive(10))[1] == b"hi"


async def test_a_protocol_is_served_once(server: SwarmNode) -> None:
    with pytest.raises(ConfigError):
        await server.serve_streams(ECHO, echo)


class TestAgainstARawPeer:
    """One end is a bare socket in the test's hand."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def pair(self, server: SwarmNode) -> AsyncIterator[tuple[FrameStream, socket.socket]]:
        near, far = socket.socketpair()
        far.setblocking(False)
        yield FrameStream(server._streams, near, Identity.generate().peer_id), far
        far.close()

    async def test_frames_in_dribs_and_drabs(self, pair: tuple[FrameStream, socket.socket]) -> None:
        stream, far = pair
        frame = FrameHeader(FrameType.STEP, payload_bytes=5).pack() + b"hello"
        receiving = asyncio.create_task(stream.receive(10))
        for byte in frame:
            far.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await receiving)[1] == b"hello"
        far.send(frame * 3 + frame[:7])
        for _ in range(3):
            assert (await stream.receive(10))[1] == b"hello"
        far.send(frame[7:])
        assert (await stream.receive(10))[1] == b"hello"

    async def test_a_timeout_loses_nothing(self, pair: tuple[FrameStream, socket.socket]) -> None:
        stream, far = pair
        payload = os.urandom(100_000)
        frame = FrameHeader(FrameType.STEP, payload_bytes=len(payload)).pack() + payload
        for start in range(0, len(frame), 25_000):
            with pytest.raises(HopTimeout):
                await stream.receive(0.02)
            far.send(frame[start : start + 25_000])
        assert (await stream.receive(10))[1] == payload

    @pytest.mark.parametrize("length", [1, 60, 200])
    async def test_an_end_inside_a_frame(
        self, pair: tuple[FrameStream, socket.socket], length: int
    ) -> None:
        stream, far = pair
        frame = FrameHeader(FrameType.STEP, payload_bytes=500).pack() + bytes(500)
        far.send(frame[:length])
        far.close()
        with pytest.raises(StreamClosed):
            await stream.receive(10)
        assert stream.closed

    async def test_a_bad_header_closes_the_stream(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        good = FrameHeader(FrameType.STEP).pack()
        far.send(good + good[:1] + b"\xff" * (len(good) - 1))
        await stream.receive(10)
        with pytest.raises(RemoteProtocolError):
            await stream.receive(10)
        assert stream.closed
        assert far.recv(10) == b""

    async def test_a_header_of_another_version_leaves_room_for_an_answer(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        far.send(b"\x02" + FrameHeader(FrameType.STEP).pack()[1:])
        for _ in range(2):
            with pytest.raises(UnsupportedError):
                await stream.receive(10)
        await stream.send(FrameHeader(FrameType.ERROR), b"{}")
        assert len(far.recv(200)) == 82

    async def test_a_length_over_the_cap_is_refused_before_the_payload(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        header = bytearray(FrameHeader(FrameType.STEP).pack())
        header[-4:] = (MAX_STEP_BYTES + 1).to_bytes(4, "big")
        far.send(header)
        with pytest.raises(RemoteProtocolError, match="over the cap"):
            await stream.receive(10)

    async def test_memory_grows_with_what_arrives(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        far.send(FrameHeader(FrameType.STEP, payload_bytes=MAX_STEP_BYTES).pack() + bytes(1000))
        with pytest.raises(HopTimeout):
            await stream.receive(0.05)
        assert len(stream._payload) == 1000
        assert stream._payload.__sizeof__() < 100_000

    async def test_half_received_frames_of_one_peer_are_few(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        first, _ = pair
        frame = FrameHeader(FrameType.STEP, payload_bytes=MAX_STEP_BYTES).pack() + bytes(50_000)
        ends = [socket.socketpair() for _ in range(MAX_LARGE_FRAMES_PER_PEER + 1)]
        streams = [FrameStream(first._table, near, first.remote) for near, _ in ends]
        for stream, (_, far) in zip(streams, ends, strict=True):
            far.send(frame)
            with pytest.raises(HopTimeout):
                await stream.receive(0.02)
            # The header and what came with it may be there; reading on needs a free slot.
            far.send(bytes(50_000))
        for stream in streams:
            with pytest.raises(HopTimeout):
                await stream.receive(0.02)
        waiting = asyncio.create_task(streams[-1].receive())
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [len(stream._payload) for stream in streams] == [100_000] * 8 + [50_000]
        streams[0].abort()
        with pytest.raises(HopTimeout):
            await streams[-1].receive(0.05)
        assert len(streams[-1]._payload) == 100_000
        streams.append(FrameStream(first._table, (extra := socket.socketpair())[0], first.remote))
        ends.append(extra)
        extra[1].send(frame)
        waiting = asyncio.create_task(streams[-1].receive())
        await asyncio.sleep(0.02)
        streams[-1].abort()
        with pytest.raises(StreamClosed):
            await waiting
        for stream, (_, far) in zip(streams, ends, strict=True):
            stream.abort()
            far.close()

    async def test_what_arrived_before_a_broken_send_is_read(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        far.send(FrameHeader(FrameType.ERROR, payload_bytes=3).pack() + b"why")
        far.close()
        with pytest.raises(StreamClosed):
            await stream.send(STEP, bytes(1000))
        assert stream.closed
        assert (await stream.receive(10))[1] == b"why"
        with pytest.raises(StreamClosed):
            await stream.receive(10)

    async def test_a_send_cut_short_ends_sending(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.send(STEP, bytes(4 << 20)), 0.05)
        assert stream.closed
        with pytest.raises(StreamClosed):
            await stream.send(STEP)
        far.send(FrameHeader(FrameType.STEP, payload_bytes=1).pack() + b"x")
        assert (await stream.receive(10))[1] == b"x", "receiving goes on"

    async def test_a_send_that_waits_for_its_turn_may_be_cancelled(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        first = asyncio.create_task(stream.send(STEP, bytes(2 << 20)))
        second = asyncio.create_task(stream.send(STEP, b"never"))
        await asyncio.sleep(0.02)
        second.cancel()
        received = 0
        while not first.done():
            try:
                received += len(far.recv(1 << 20))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        await first
        assert not stream.closed

    async def test_one_reader_at_a_time(self, pair: tuple[FrameStream, socket.socket]) -> None:
        stream, far = pair
        first = asyncio.create_task(stream.receive(10))
        await asyncio.sleep(0)
        with pytest.raises(LocalProtocolError, match="another task"):
            await stream.receive(10)
        far.send(FrameHeader(FrameType.STEP).pack())
        await first

    async def test_a_fast_peer_does_not_keep_the_loop(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, far = pair
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        payload = bytes(50_000)
        for _ in range(20):
            far.send(FrameHeader(FrameType.STEP, payload_bytes=len(payload)).pack() + payload)
            await stream.receive(10)
        assert turns >= 10
        task.cancel()

    async def test_payloads_over_the_cap_are_not_sent(
        self, pair: tuple[FrameStream, socket.socket]
    ) -> None:
        stream, _ = pair
        with pytest.raises(LocalProtocolError):
            await stream.send(FrameHeader(FrameType.PING), bytes(MAX_CONTROL_BYTES + 1))
        with pytest.raises(LocalProtocolError):
            await stream.send(STEP, bytes(MAX_STEP_BYTES + 1))
        assert not stream.closed
