"""A link that is worse than loopback: a TCP proxy that delays, throttles, holds or cuts.

One `LinkProxy` stands in front of one listening address; a node that announces the proxy's address
instead of its own is reached through it. Bytes pass unchanged and in order, `Link.delay_s` after
they came, at most `Link.bytes_per_s` of them in each direction of each connection. No more is held
than fits on such a link, so a sender feels the backpressure of a slow one.

libp2p dials from the port that it listens on, so the proxy can tell which node a connection comes
from: `link_of` gets the dialler's address and may give every pair of nodes a link of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from planetserve.errors import ConfigError

_READ_BYTES = 16 * 1024
_SOCKET_BYTES = 64 * 1024
_BUFFER_BYTES = 64 * 1024
_MOST_HELD_BYTES = 16 * 2**20

TcpAddress = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Link:
    """Both directions of a link.

    Raises:
        ConfigError: a delay below 0, or no bytes per second.
    """

    delay_s: float = 0.0
    """One way; a round trip takes twice as long."""
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.delay_s < math.inf and self.bytes_per_s > 0):
            raise ConfigError(f"no link has {self.delay_s} s delay and {self.bytes_per_s} bytes/s")

    @property
    def held_bytes(self) -> int:
        """What is under way at most, in one direction."""
        under_way = min(self.bytes_per_s * self.delay_s, _MOST_HELD_BYTES) if self.delay_s else 0
        return int(under_way) + _BUFFER_BYTES


class LinkProxy:
    """A running proxy. Made by `start`; an async context manager that closes itself."""

    def __init__(self, target: TcpAddress, link_of: Callable[[TcpAddress], Link]):
        self.num_connections = 0
        """Connections accepted so far."""
        self._target = target
        self._link_of = link_of
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self._closed = False

    @classmethod
    async def start(
        cls,
        target: TcpAddress,
        link: Link | Callable[[TcpAddress], Link],
        listen: TcpAddress = ("127.0.0.1", 0),
    ) -> LinkProxy:
        """Listen, and connect whoever comes to `target`.

        Args:
            target: where connections lead.
            link: the link of every connection, or what tells it from the dialler's address.
            listen: where to be dialled; port 0 takes a free one.

        Raises:
            OSError: the address cannot be listened on.
        """
        proxy = cls(target, link if callable(link) else lambda _: link)
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it: what the kernel holds is not on the emulated link.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            sock.bind(listen)
            proxy._server = await asyncio.start_server(proxy._on_connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        return proxy

    @property
    def address(self) -> TcpAddress:
        """Where to dial the proxy."""
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def hold(self) -> None:
        """Let nothing through until `release`; connections stay open."""
        self._flowing.clear()

    def release(self) -> None:
        """Let bytes flow again, those held first."""
        self._flowing.set()

    async def cut(self) -> None:
        """Break every connection at once; new ones are accepted."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stop listening and break every connection. Idempotent."""
        self._closed = True
        self._server.close()
        await self.cut()
        await self._server.wait_closed()

    async def __aenter__(self) -> LinkProxy:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is None or self._closed:
            writer.transport.abort()
            return
        self._tasks.add(task)
        self.num_connections += 1
        link = self._link_of(writer.get_extra_info("peername")[:2])
        writers = [writer]
        try:
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            far.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(far, self._target)
            except BaseException:
                far.close()
                raise
            far_reader, far_writer = await asyncio.open_connection(sock=far)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(_Way(link, self._flowing).carry(reader, far_writer))
                both.create_task(_Way(link, self._flowing).carry(far_reader, writer))
        except (OSError, ExceptionGroup):
            pass  # one end broke: the other must see it
        except asyncio.CancelledError:
            pass  # cut
        finally:
            self._tasks.discard(task)
            for item in writers:
                item.transport.abort()


class _Way:
    """One direction of one connection: bytes wait here for as long as they are on the link."""

    def __init__(self, link: Link, flowing: asyncio.Event):
        self._link = link
        self._flowing = flowing
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._num_held = 0
        self._free_at = 0.0
        self._changed = asyncio.Event()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Move bytes until `reader` ends, then end `writer`."""
        # Nothing may wait behind the link in a buffer of this process.
        writer.transport.set_write_buffer_limits(high=0)
        taking = asyncio.create_task(self._take(reader))
        try:
            while True:
                await self._until(lambda: bool(self._pieces))
                due, piece = self._pieces.popleft()
                await self._sleep_until(due)
                await self._flowing.wait()
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()
                self._num_held -= len(piece)
                self._changed.set()
            with contextlib.suppress(OSError):
                writer.write_eof()
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        piece = b"-"
        while piece:
            await self._until(lambda: self._num_held < self._link.held_bytes)
            try:
                piece = await reader.read(_READ_BYTES)
            except OSError:
                piece = b""
            # A piece starts when the one before it has left, and arrives after the delay.
            self._free_at = max(self._free_at, loop.time()) + len(piece) / self._link.bytes_per_s
            self._pieces.append((self._free_at + self._link.delay_s, piece))
            self._num_held += len(piece)
            self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _sleep_until(self, due: float) -> None:
        delay_s = due - asyncio.get_running_loop().time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
