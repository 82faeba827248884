"""Messages with their length in front, as protobuf streams have them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.libp2p.sockets import read_exactly

_MAX_LENGTH_BYTES = 4
_MAX_VARINT_BYTES = 10
_FIXED_BYTES = {1: 8, 5: 4}


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


def check_shape(message: memoryview, most: int, most_inside: int | None = None) -> None:
    """Refuse a protobuf message of more fields than it needs, before anybody decodes it: a field
    may be two bytes long and take fifty when decoded.

    Args:
        message: what was received.
        most: fields that it may have.
        most_inside: fields that each part of it may have, where these are messages too.

    Raises:
        RemoteProtocolError: it has more, or is none.
    """
    try:
        for count, (_, value) in enumerate(fields(message)):
            if count >= most:
                raise RemoteProtocolError("a message with too many fields")
            if most_inside is not None and isinstance(value, memoryview):
                check_shape(value, most_inside)
    except IndexError:
        raise RemoteProtocolError("a message is cut short") from None


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of the fields of a protobuf message; fixed-size ones as their bytes.

    Raises:
        IndexError: the message is cut short.
        RemoteProtocolError: it is none.
    """
    offset = 0
    while offset < len(message):
        tag, offset = read_varint(message, offset)
        kind = tag & 7
        if kind == 0:
            number, offset = read_varint(message, offset)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, offset = read_varint(message, offset)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            raise RemoteProtocolError("not a message")
        if offset + size > len(message):
            raise IndexError
        yield tag >> 3, message[offset : offset + size]
        offset += size


def varint(number: int) -> bytes:
    """A number as protobuf has it."""
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def read_varint(data: bytes | memoryview, offset: int) -> tuple[int, int]:
    """A number as protobuf has it, and the offset after it.

    Raises:
        IndexError: `data` ends before the number does, or the number is too long.
    """
    number = 0
    for position in range(_MAX_VARINT_BYTES):
        byte = data[offset + position]
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return number, offset + position + 1
    raise IndexError("too long a number")
