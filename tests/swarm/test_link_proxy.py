"""The emulated link passes everything, later, at its rate, and holds no more than fits on it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from planetserve.errors import ConfigError
from planetserve.testing.proxy import Link, LinkProxy, TcpAddress, Way

BLOB = random.Random(3).randbytes(300_000)


@asynccontextmanager
async def echo_server() -> AsyncIterator[TcpAddress]:
    """Sends back what it gets, and ends when the other side does."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()
        await server.wait_closed()


async def exchange(address: TcpAddress, data: bytes) -> tuple[bytes, float]:
    """What comes back for `data`, and how long the whole of it took."""
    reader, writer = await asyncio.open_connection(*address)
    loop = asyncio.get_running_loop()
    started = loop.time()
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    elapsed = loop.time() - started
    writer.close()
    await writer.wait_closed()
    return answer, elapsed


async def test_bytes_pass_unchanged_and_late() -> None:
    async with echo_server() as target:
        async with await LinkProxy.start(target, Link(delay_s=0.03)) as proxy:
            answer, elapsed = await exchange(proxy.address, BLOB)
            assert proxy.num_connections == 1
    assert hashlib.sha256(answer).digest() == hashlib.sha256(BLOB).digest()
    assert elapsed > 0.059


async def test_no_more_bytes_pass_than_the_rate_allows() -> None:
    async with echo_server() as target:
        async with await LinkProxy.start(target, Link(bytes_per_s=1e6)) as proxy:
            answer, elapsed = await exchange(proxy.address, BLOB)
    assert answer == BLOB
    assert elapsed > 0.29


async def test_a_held_link_takes_a_bounded_amount_and_loses_nothing() -> None:
    async with echo_server() as target, await LinkProxy.start(target, Link()) as proxy:
        proxy.hold()
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(BLOB * 100)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await writer.drain()
        proxy.release()
        received = 0
        while received < 100 * len(BLOB):
            piece = await reader.read(1 << 20)
            assert piece
            received += len(piece)
        writer.close()
        await writer.wait_closed()


async def test_a_cut_ends_connections_and_new_ones_work() -> None:
    async with echo_server() as target, await LinkProxy.start(target, Link()) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await proxy.cut()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()
        assert (await exchange(proxy.address, b"again"))[0] == b"again"


async def test_the_dialler_decides_on_the_link() -> None:
    seen: list[TcpAddress] = []

    def link_of(address: TcpAddress) -> Link:
        seen.append(address)
        return Link(delay_s=0.02)

    async with echo_server() as target, await LinkProxy.start(target, link_of) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert set(seen) == {writer.get_extra_info("sockname")}
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("ways", [{Way.IN}, {Way.OUT}, {Way.IN, Way.OUT}])
async def test_a_link_changes_while_bytes_are_on_it(ways: set[Way]) -> None:
    link = Link()
    async with echo_server() as target, await LinkProxy.start(target, lambda _: link) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        link = Link(holds=frozenset(ways))
        writer.write(BLOB)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.1)
        link = Link()
        proxy.look_again()
        assert await reader.readexactly(len(BLOB)) == BLOB
        link = Link(corrupts=frozenset(ways))
        writer.write(b"x")
        assert (await reader.readexactly(1) == b"x") == (len(ways) == 2)
        writer.close()
        await writer.wait_closed()


async def test_only_some_diallers_are_cut_off() -> None:
    async with echo_server() as target, await LinkProxy.start(target, Link()) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address)
        mine = writer.get_extra_info("sockname")
        await proxy.cut(lambda address: address != mine)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await proxy.cut(lambda address: address == mine)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()


async def test_an_absent_target_ends_the_connection() -> None:
    async with echo_server() as target:
        pass
    async with await LinkProxy.start(target, Link()) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()


@pytest.mark.parametrize("bad", [{"delay_s": -1.0}, {"delay_s": float("inf")}, {"bytes_per_s": 0}])
def test_impossible_links_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Link(**bad)
