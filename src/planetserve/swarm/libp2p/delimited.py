"""Protobuf messages with their length in front, as libp2p sends them on its streams."""

from __future__ import annotations

import io
import socket

from google.protobuf import proto  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.libp2p.sockets import read_exactly

_MAX_LENGTH_BYTES = 4


async def read_message(sock: socket.socket, head: bytes, most: int) -> tuple[bytes, bytes]:
    """Read one message.

    The length is decoded here, because the library's function reads from a buffer that holds the
    whole message, and this one must refuse a length before it waits for as many bytes.

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


def with_length(message: Message) -> bytes:
    """A message as `read_message` reads it."""
    output = io.BytesIO()
    proto.serialize_length_prefixed(message, output)
    return output.getvalue()
