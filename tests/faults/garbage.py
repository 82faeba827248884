"""Malformed frames, control messages and directory records from a seed: the same each time.

Most of it is something right with one thing wrong, because that gets further than noise does.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack

from planetserve.crypto.identity import Identity
from planetserve.swarm import records
from planetserve.types import BlockSpan, ServerInfo, ServerState
from planetserve.wire.frame import HEADER_BYTES, FrameHeader, FrameType

EDGE_NUMBERS = (0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


class Garbage:
    """A source of malformed input."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self._identity = Identity.generate()

    def frame(self) -> bytes:
        """Bytes that begin with a header that no receiver may accept as the first of a stream."""
        kinds: tuple[Callable[[], bytes], ...] = (
            self._noise, self._wrong_field, self._truncated, self._not_first, self._bad_message,
        )  # fmt: skip
        return self.random.choice(kinds)()

    def _noise(self) -> bytes:
        return b"\xff" + self.random.randbytes(self.random.randrange(2 * HEADER_BYTES))

    def _wrong_field(self) -> bytes:
        """A good header with one field that is out of range."""
        header = bytearray(FrameHeader(FrameType.OPEN, session=self.random.randbytes(16)).pack())
        offset, form, values = self.random.choice(
            [
                (0, ">B", (0, 2, 255)),
                (1, ">B", (0, 11, 200)),
                (2, ">H", (2, 65535)),
                (22, ">B", (2, 255)),
                (23, ">B", (1, 255)),
                (52, ">B", (4, 255)),
                (53, ">B", (1, 255)),
                (54, ">B", (5, 255)),
                (56, ">I", (1, 2**32 - 1)),
                (74, ">H", (0,)),
                (76, ">I", (64 * 1024 + 1, 2**31, 2**32 - 1)),
            ]
        )
        struct.pack_into(form, header, offset, self.random.choice(values))
        return bytes(header) + self.random.randbytes(self.random.randrange(64))

    def _truncated(self) -> bytes:
        header = FrameHeader(FrameType.OPEN, payload_bytes=self.random.randrange(1, 60_000)).pack()
        whole = header + self.random.randbytes(200)
        return whole[: self.random.randrange(len(whole))]

    def _not_first(self) -> bytes:
        """A good frame of a type that begins no stream."""
        kind = self.random.choice(
            [FrameType.STEP, FrameType.EDGE_KEYS, FrameType.CLOSE, FrameType.PONG]
        )
        size = self.random.choice((0, 16, 84, 5000))
        header = FrameHeader(kind, session=self.random.randbytes(16), payload_bytes=size)
        return header.pack() + self.random.randbytes(size)

    def _bad_message(self) -> bytes:
        return self.control(self.random.choice([FrameType.OPEN, FrameType.HELLO]), {})

    def control(self, kind: FrameType, right: dict[str, Any]) -> bytes:
        """An OPEN or HELLO frame whose message is `right` with something wrong in it."""
        payload = self._spoiled_json(right)[: 64 * 1024]
        header = FrameHeader(
            kind,
            session=self.random.randbytes(16),
            edge=self.random.choice((0, 1, 2, 1023, 65535)),
            payload_bytes=len(payload),
        )
        return header.pack() + payload

    def _spoiled_json(self, right: dict[str, Any]) -> bytes:
        values = dict(right) or {"edge": 1, "epoch": 0}
        name = self.random.choice(list(values))
        match self.random.randrange(9):
            case 0:
                return self.random.randbytes(self.random.randrange(200))
            case 1:
                return b"[" * self.random.choice((10, 2000, 60_000))
            case 2:
                return b'{"a":' * 5000 + b"1" + b"}" * 5000
            case 3:
                del values[name]
            case 4:
                values[self.random.randbytes(4).hex()] = 1
            case 5:
                values[name] = self.value()
            case 6:
                return json.dumps(values).encode()[:-1]
            case 7:
                return b'{"edge":' + b"9" * self.random.choice((20, 5000, 60_000)) + b"}"
            case _:
                values[name] = "\ud800" + "x" * self.random.choice((0, 300, 60_000))
        return json.dumps(values).encode()

    def value(self) -> Any:
        """Something of another type or out of range."""
        return self.random.choice(
            [None, True, -1, 1.5, float("nan"), float("inf"), "", "x" * 70_000, [], {}, [[]],
             "\x1b[2J", "client", 2**63, -(2**70), *EDGE_NUMBERS]
        )  # fmt: skip

    def record(self, now_s: float) -> tuple[bytes, bytes, bytes, float]:
        """Key, subkey, value and expiry of a directory record with something wrong in it."""
        identity = self._identity
        info = ServerInfo(
            peer_id=identity.peer_id, model="tiny", fingerprint="f" * 64, span=BlockSpan(0, 4),
            num_blocks=8, state=ServerState.ONLINE, dtype="float32", addresses=(),
            decode_ms_per_block=1.0, tokens_per_s_per_block=9.0, network_bytes_per_s=1e8,
            free_cache_tokens=4, max_session_tokens=4,
        )  # fmt: skip
        body = records.server_body(info, now_s, now_s + 60)
        key, envelope = body.dht_key(), records.sign(identity, body)
        subkey, value = msgpack.packb(identity.peer_id), msgpack.packb(envelope)
        ends = body.expires_at_s
        nested = b"\xc0"
        for _ in range(self.random.choice((20, 150, 900))):
            nested = b"\xc7" + bytes([min(len(nested), 255), 0x40]) + b"\x91" + nested[-250:]
        match self.random.randrange(8):
            case 0:
                value = self.random.randbytes(self.random.randrange(6000))
            case 1:
                spoiled = bytearray(value)
                spoiled[self.random.randrange(3, len(spoiled))] ^= 1 + self.random.randrange(255)
                value = bytes(spoiled)
            case 2:
                subkey = self.random.choice(
                    [msgpack.packb("x" * 46), nested, b"\x91" * 900, b"\x01"]
                )
            case 3:
                value = self.random.choice([nested, b"\x91" * 3000, b"\xdd\xff\xff\xff\xff"])
            case 4:
                ends += self.random.choice((-61, 1, 1e9))
            case 5:
                key = self.random.randbytes(20)
            case 6:
                value = msgpack.packb(envelope[: self.random.randrange(len(envelope))])
            case _:
                value = msgpack.packb(b"[" * self.random.choice((10, 4000)))
        return key, subkey, value, ends
