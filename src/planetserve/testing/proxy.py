"""A link that is worse than loopback: a TCP proxy that delays, throttles, holds, corrupts or cuts.

One `LinkProxy` stands in front of one listening address; a node that announces the proxy's address
instead of its own is reached through it. Bytes pass in order, and unchanged unless the link says
otherwise, `Link.delay_s` after they came, at most `Link.bytes_per_s` of them in each direction of
each connection. No more is held than fits on such a link, so a sender feels the backpressure of a
slow one. What a link holds back is not lost, as TCP would not lose it; not even the end of a
connection passes.

libp2p dials from the port that it listens on, so the proxy can tell which node a connection comes
from: `link_of` gets the dialler's address and may give every pair of nodes a link of its own, and
another one at another time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from planetserve.errors import ConfigError
from planetserve.swarm.libp2p.sockets import stop_serving

_READ_BYTES = 16 * 1024
_SOCKET_BYTES = 64 * 1024
_BUFFER_BYTES = 64 * 1024
_MOST_HELD_BYTES = 16 * 2**20

TcpAddress = tuple[str, int]


class Way(enum.Enum):
    """Which way bytes travel, seen from the node behind the proxy."""

    IN = "in"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Link:
    """Both directions of a link.

    Raises:
        ConfigError: a delay below 0, or no bytes per second.
    """

    delay_s: float = 0.0
    """One way; a round trip takes twice as long."""
    bytes_per_s: float = math.inf
    holds: frozenset[Way] = frozenset()
    """Nothing passes these ways."""
    corrupts: frozenset[Way] = frozenset()
    """What passes these ways has flipped bits."""

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
        self.target = target
        """Where new connections lead."""
        self._link_of = link_of
        self._is_held = False
        self._news = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], TcpAddress] = {}
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
            link: the link of every connection, or what tells it from the dialler's address; asked
                for every piece that passes.
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
        self._is_held = True

    def release(self) -> None:
        """Let bytes flow again, those held first."""
        self._is_held = False
        self.look_again()

    def look_again(self) -> None:
        """`link_of` gives other answers from now on: wake those that a link has held."""
        self._news.set()
        self._news = asyncio.Event()

    async def cut(self, dialler: Callable[[TcpAddress], bool] = lambda _: True) -> None:
        """Break the connections of some diallers, by default all; new ones are accepted."""
        tasks = [task for task, address in self._tasks.items() if dialler(address)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stop listening and break every connection. Idempotent."""
        self._closed = True
        await stop_serving(self._server)
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
        address: TcpAddress = writer.get_extra_info("peername")[:2]
        self._tasks[task] = address
        self.num_connections += 1
        writers = [writer]
        try:
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            far.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(far, self.target)
            except BaseException:
                far.close()
                raise
            far_reader, far_writer = await asyncio.open_connection(sock=far)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(_Pipe(self, address, Way.IN).carry(reader, far_writer))
                both.create_task(_Pipe(self, address, Way.OUT).carry(far_reader, writer))
        except (OSError, ExceptionGroup):
            pass  # one end broke: the other must see it
        except asyncio.CancelledError:
            pass  # cut
        finally:
            del self._tasks[task]
            for item in writers:
                item.transport.abort()

    def link_to(self, dialler: TcpAddress) -> Link:
        """The way to a dialler, as it is now."""
        return self._link_of(dialler)

    async def until_open(self, dialler: TcpAddress, way: Way) -> Link:
        """The link, once it lets something through this way."""
        while self._is_held or way in (link := self._link_of(dialler)).holds:
            await self._news.wait()
        return link


class _Pipe:
    """One direction of one connection: bytes wait here for as long as they are on the link."""

    def __init__(self, proxy: LinkProxy, dialler: TcpAddress, way: Way):
        self._proxy = proxy
        self._dialler = dialler
        self._way = way
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
                link = await self._proxy.until_open(self._dialler, self._way)
                if not piece:
                    break
                writer.write(_flipped(piece) if self._way in link.corrupts else piece)
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
            link = self._link
            # A piece starts when the one before it has left, and arrives after the delay.
            self._free_at = max(self._free_at, loop.time()) + len(piece) / link.bytes_per_s
            self._pieces.append((self._free_at + link.delay_s, piece))
            self._num_held += len(piece)
            self._changed.set()

    @property
    def _link(self) -> Link:
        return self._proxy.link_to(self._dialler)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _sleep_until(self, due: float) -> None:
        delay_s = due - asyncio.get_running_loop().time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)


def _flipped(piece: bytes) -> bytes:
    return piece[:-1] + bytes([piece[-1] ^ 1])
