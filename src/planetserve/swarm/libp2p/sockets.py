"""Waiting on non-blocking sockets without losing a byte when the wait is cancelled; how many there
may be.

asyncio's own `sock_recv` reads and then wakes its caller; a caller cancelled in between has lost
what was read. Here waiting and reading are two steps, and only the waiting can be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket

_MAX_FILES = 65_536
"""Maximum number of open files to ask for; some systems report no limit but have one."""

_READ_BYTES = 64 * 1024


def raise_file_limit() -> int:
    """Let this process, and those that it starts, open as many files as the system allows it.

    Returns:
        How many that are, `_MAX_FILES` at most.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # "No limit" is a negative number on some systems.
    most = _MAX_FILES if hard in (-1, resource.RLIM_INFINITY) else min(hard, _MAX_FILES)
    if 0 <= soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return now if 0 <= now < most else most


class SocketReader:
    """Reads a non-blocking socket, for one reader at a time.

    The event loop goes on watching the socket from one read to the next: most streams are read
    again before anything comes, and asking the system anew takes longer than the read.
    """

    def __init__(self, sock: socket.socket):
        self.num_bytes = 0
        """Bytes read so far."""
        self._socket = sock
        self._waiting: tuple[bytearray, int, asyncio.Future[None]] | None = None
        self._watched_by: asyncio.AbstractEventLoop | None = None

    async def read_into(self, buffer: bytearray, limit: int) -> None:
        """Append up to `limit` received bytes to `buffer`.

        What was read is in the buffer before the caller goes on, so a cancellation loses nothing.

        Raises:
            OSError: the connection broke.
            EOFError: it ended.
        """
        try:
            self._read(buffer, limit)
        except BlockingIOError:
            await self._wait(buffer, limit)
        else:
            # A peer that sends faster than this node reads must not keep the event loop to itself.
            await asyncio.sleep(0)

    def unwatch(self) -> None:
        """Have the loop forget the socket; to be called before it is closed."""
        loop, self._watched_by = self._watched_by, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._socket.fileno())

    def _read(self, buffer: bytearray, limit: int) -> None:
        piece = self._socket.recv(limit)
        if not piece:
            raise EOFError
        buffer += piece
        self.num_bytes += len(piece)

    async def _wait(self, buffer: bytearray, limit: int) -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._waiting = buffer, limit, done
        if self._watched_by is None:
            loop.add_reader(self._socket.fileno(), self._on_readable)
            self._watched_by = loop
        try:
            await done
        finally:
            self._waiting = None

    def _on_readable(self) -> None:
        if self._waiting is None or self._waiting[2].done():
            # Nobody reads, so a full socket is to stop the peer.
            self.unwatch()
            return
        buffer, limit, done = self._waiting
        try:
            self._read(buffer, limit)
        except BlockingIOError:
            return
        except (OSError, EOFError) as error:
            done.set_exception(error)
        else:
            done.set_result(None)


async def readable(sock: socket.socket) -> None:
    """Wait until a read would not block."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    number = sock.fileno()  # given a socket, asyncio describes it in an error that it then ignores
    loop.add_reader(number, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(number)


async def writable(sock: socket.socket) -> None:
    """Wait until a write would not block."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    number = sock.fileno()
    loop.add_writer(number, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(number)


async def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of `data`.

    Raises:
        OSError: the connection broke.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await writable(sock)


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes and not one more.

    Raises:
        OSError: the connection broke.
        EOFError: it ended before.
    """
    data = bytearray()
    while len(data) < size:
        try:
            piece = sock.recv(min(size - len(data), _READ_BYTES))
        except BlockingIOError:
            await readable(sock)
            continue
        if not piece:
            raise EOFError("the connection ended")
        data += piece
    return bytes(data)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def stop_serving(server: asyncio.Server) -> None:
    """Close a server after what has just arrived has had its first turn.

    asyncio leaves a connection open whose server was closed between its arrival and that turn
    (python/cpython#109564).
    """
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    finally:
        server.close()
