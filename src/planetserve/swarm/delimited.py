"""Messages with their length in front, as protobuf streams have them."""

from __future__ import annotations

import socket

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.sockets import read_exactly

_MAX_LENGTH_BYTES = 4


async def read_message(sock: socket.socket, head: bytes, most: int) -> tuple[bytes, bytes]:
    """Read one message.

    Args:
        sock: a non-blocking socket.
        head: bytes of it that have been read.
        most: bytes that a message may have; memory grows with what arrives.

    Returns:
        The message, and what is left of `head`.

    Raises:
        OSError: the connection broke.
        EOFError: it ended before the message did.
        RemoteProtocolError: the message is too long.
    """
    size = shift = 0
    for _ in range(_MAX_LENGTH_BYTES):
        part, head = head[:1], head[1:]
        (byte,) = part or await read_exactly(sock, 1)
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    else:
        raise RemoteProtocolError("the length of a message is too long")
    if size > most:
        raise RemoteProtocolError(f"a message of {size} bytes")
    message = head[:size] + await read_exactly(sock, max(0, size - len(head)))
    return message, head[size:]


def varint(number: int) -> bytes:
    """A number as protobuf has it."""
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number as protobuf has it, and the offset after it.

    Raises:
        IndexError: `data` ends before the number does.
    """
    number = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, offset
