"""Limits around hivemind's decoders, for bytes that strangers send.

hivemind 1.1.12 decodes what it receives before any validator sees it, without limits on depth, size
or number; deep enough input ends the process. `install` puts a check in front of each such place.
It runs when `planetserve.swarm` is imported and does nothing the second time. Values within the
limits are decoded as before. Tensors are never decoded by hivemind here (the data path has frames
of its own), so its tensor codec needs no guard.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.utils.serializer import MSGPackSerializer

from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import HEADER_BYTES, MAX_STEP_BYTES

MAX_DEPTH = 16
MAX_ITEMS = 16 * 1024
MAX_DECODED_BYTES = 1280 * 1024
"""Maximum size of a decoded value in bytes: a whole DHT dictionary (256 records of 4 KB) fits."""
MAX_RECORDS_PER_KEY = 256
MAX_STREAM_MESSAGE_BYTES = MAX_STEP_BYTES + HEADER_BYTES
MAX_PEER_ID_BYTES = 64

_TUPLE, _DICTIONARY = 0x40, 0x50

# First byte of a msgpack value -> size of what follows, or of the length that follows.
_SCALARS = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
_STRINGS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

_hivemind_loads = MSGPackSerializer.loads
_hivemind_init_peer_id = PeerID.__init__


def install() -> None:
    """Install every guard, once per process."""
    MSGPackSerializer.loads = staticmethod(_loads)
    DictionaryDHTValue.unpackb = staticmethod(_unpack_dictionary)
    P2P.receive_raw_data = staticmethod(_receive_raw_data)
    PeerID.__init__ = _init_peer_id


def check_msgpack(data: bytes) -> None:
    """Walk over one msgpack value without building it.

    Raises:
        RemoteProtocolError: it is too long, too deep, has too many items, is cut short, has bytes
            left over, or holds an extension type that the DHT does not use.
    """
    if len(data) > MAX_DECODED_BYTES:
        raise RemoteProtocolError(f"a msgpack value of {len(data)} bytes is too long")
    scan = _Scan(data)
    scan.value(depth=1)
    if scan.position != len(data):
        raise RemoteProtocolError("bytes are left over after a msgpack value")


class _Scan:
    """A position in a msgpack value. Its recursion ends at `MAX_DEPTH`."""

    def __init__(self, data: bytes):
        self._data = data
        self._num_items = 0
        self.position = 0

    def value(self, depth: int) -> None:
        self._num_items += 1
        if depth > MAX_DEPTH or self._num_items > MAX_ITEMS:
            raise RemoteProtocolError("a msgpack value is too deep or has too many items")
        code = self._number(1)
        if code < 0x80 or code >= 0xE0:
            return
        if code < 0x90:
            self._values(2 * (code & 0x0F), depth)
        elif code < 0xA0:
            self._values(code & 0x0F, depth)
        elif code < 0xC0:
            self._skip(code & 0x1F)
        elif code in _SCALARS:
            self._skip(_SCALARS[code])
        elif code in _STRINGS:
            self._skip(self._number(_STRINGS[code]))
        elif code in _ARRAYS:
            self._values(self._number(_ARRAYS[code]), depth)
        elif code in _MAPS:
            self._values(2 * self._number(_MAPS[code]), depth)
        elif code in _EXTENSIONS:
            self._extension(self._number(_EXTENSIONS[code]), depth)
        elif code in _FIXED_EXTENSIONS:
            self._extension(_FIXED_EXTENSIONS[code], depth)
        else:
            raise RemoteProtocolError("not msgpack")

    def _values(self, count: int, depth: int) -> None:
        if count > len(self._data) - self.position:
            raise RemoteProtocolError("a msgpack value is cut short")
        for _ in range(count):
            self.value(depth + 1)

    def _extension(self, size: int, depth: int) -> None:
        if self._number(1) not in (_TUPLE, _DICTIONARY):
            raise RemoteProtocolError("a msgpack extension type that the DHT does not use")
        end = self.position + size
        self.value(depth + 1)
        if self.position != end:
            raise RemoteProtocolError("a msgpack extension does not hold exactly one value")

    def _number(self, width: int) -> int:
        start = self.position
        self._skip(width)
        return int.from_bytes(self._data[start : self.position], "big")

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self._data):
            raise RemoteProtocolError("a msgpack value is cut short")


def _loads(buf: bytes) -> object:
    check_msgpack(buf)
    value: object = _hivemind_loads(buf)
    return value


def _unpack_dictionary(raw: bytes) -> DictionaryDHTValue:
    """A dictionary of text -> (bytes, finite expiry), as large as one of ours may be, whatever
    limit the sender gives."""
    match MSGPackSerializer.loads(raw):
        case [_, _, list(items)] if len(items) <= MAX_RECORDS_PER_KEY:
            pass
        case _:
            raise RemoteProtocolError("not a DHT dictionary, or too large a one")
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for item in items:
            match item:
                case [str(key), bytes(value), float(expires_at_s)] if math.isfinite(expires_at_s):
                    dictionary.store(key, value, expires_at_s)
                case _:
                    raise RemoteProtocolError("a DHT dictionary holds something else than records")
    return dictionary


async def _receive_raw_data(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if size > MAX_STREAM_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a stream message of {size} bytes is over the limit")
    return await reader.readexactly(size)


def _init_peer_id(self: Any, peer_id_bytes: bytes) -> None:
    # Writing an id in base58 takes time that grows with the square of its length.
    if len(peer_id_bytes) > MAX_PEER_ID_BYTES:
        raise RemoteProtocolError(f"a peer id of {len(peer_id_bytes)} bytes is too long")
    _hivemind_init_peer_id(self, peer_id_bytes)
