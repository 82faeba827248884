"""A limit to the fields of a protobuf message, checked before the message is decoded.

The library takes some fifty bytes for a field that may be two bytes long, and has no limit to their
number. So an answer of a few megabytes could take a hundred times as much.
"""

from __future__ import annotations

from collections.abc import Iterator

from planetserve.errors import RemoteProtocolError

_MAX_VARINT_BYTES = 10
_VARINT, _LENGTH_PREFIXED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
"""Wire types, and sizes in bytes of those that have one.
https://protobuf.dev/programming-guides/encoding"""


def check_num_fields(message: memoryview, most: int, most_inside: int | None = None) -> None:
    """Refuse a message of more fields than it needs.

    Args:
        message: what was received.
        most: fields that it may have.
        most_inside: fields that each part of it may have, where these are messages too.

    Raises:
        RemoteProtocolError: it has more, or is no message.
    """
    try:
        for count, part in enumerate(_parts(message)):
            if count >= most:
                raise RemoteProtocolError("a message with too many fields")
            if most_inside is not None:
                check_num_fields(part, most_inside)
    except IndexError:
        raise RemoteProtocolError("a message is cut short") from None


def _parts(message: memoryview) -> Iterator[memoryview]:
    """For each field its content where that may be a message, else nothing."""
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        wire_type = tag & 7
        if wire_type == _VARINT:
            size = _varint(message, offset)[1] - offset
        elif wire_type == _LENGTH_PREFIXED:
            size, offset = _varint(message, offset)
        elif wire_type in _FIXED_BYTES:
            size = _FIXED_BYTES[wire_type]
        else:
            raise RemoteProtocolError("not a message")
        if offset + size > len(message):
            raise IndexError
        yield message[offset : offset + size] if wire_type == _LENGTH_PREFIXED else message[:0]
        offset += size


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    number = 0
    for position in range(_MAX_VARINT_BYTES):
        byte = message[offset + position]
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return number, offset + position + 1
    raise IndexError
