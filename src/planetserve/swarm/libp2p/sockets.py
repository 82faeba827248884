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
"""Some systems say that there is no limit and mean less than they could count."""

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
