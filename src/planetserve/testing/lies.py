"""What a hostile server of a simulated swarm does, besides serving: its lies, one kind at a time.

Lies about results and steps are sealed as the truth would be, so they come from somebody who has
the keys of the edge; the others are what anybody does who writes the bytes of its own streams.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from planetserve.crypto.channel import EdgeSealer, Sealer
from planetserve.edge.sender import StepSender
from planetserve.errors import PlanetServeError, error_from_code
from planetserve.swarm.network import Buffer
from planetserve.types import PeerId
from planetserve.wire.frame import FLAG_KEEP_LAST, FrameHeader, FrameType
from planetserve.wire.messages import error_reply

Frame = tuple[FrameHeader, bytes]

_SEALED_LIES = ("values", "tables", "nonfinite", "keep_last", "steps")
"""The first two may change a text's tokens: nobody can tell them from the truth."""
LIES = (*_SEALED_LIES, "bits", "repeat", "drop", "stall", "noise", "refuse", "accuse")
_CODES = (
    "config", "protocol", "capacity", "cache_exhausted", "queue_full", "session", "session_length",
    "session_closed", "session_expired", "decryption", "local_protocol", "remote", "internal",
)  # fmt: skip


class Liar:
    """The lies of one server.

    Args:
        kind: one of `LIES`.
        rng: draws when it lies, and how.
        told: counts its lies, by kind.
        altered: where ids of sessions are kept whose results it has changed.
        neighbours: peers that it accuses.
    """

    def __init__(
        self,
        kind: str,
        rng: random.Random,
        told: Counter[str],
        altered: dict[bytes, None],
        neighbours: Sequence[PeerId],
    ):
        self.kind = kind
        self._rng = rng
        self._told = told
        self._altered = altered
        self._neighbours = neighbours
        self._rate = rng.choice((0.1, 0.5, 1.0))

    def before_sealing(
        self, header: FrameHeader, parts: Sequence[Buffer]
    ) -> tuple[FrameHeader, Sequence[Buffer]]:
        """What is sealed in the place of a step or an answer."""
        rng = self._rng
        if self.kind not in _SEALED_LIES or rng.random() >= self._rate:
            return header, parts
        self._told[self.kind] += 1
        match self.kind:
            case "values":
                self._altered[header.session] = None
                return header, (parts[0], _altered(parts[1], rng, rng.randrange(1, 8191)))
            case "nonfinite":
                value = rng.choice((np.nan, np.inf, -np.inf))
                return header, (parts[0], _altered(parts[1], rng, value))
            case "tables":
                self._altered[header.session] = None
                if rng.random() < 0.5:
                    return header, (_flipped(bytes(parts[0]), rng), parts[1])
                name = rng.choice(("position", "num_tokens", "chunk", "num_chunks", "flags"))
                value = getattr(header, name) + 1
                return replace(header, **{name: value % 4 if name == "flags" else value}), parts
            case "steps":
                return replace(header, step=max(0, header.step + rng.choice((-1, 1, 1000)))), parts
            case "keep_last":
                return replace(header, flags=header.flags ^ FLAG_KEEP_LAST), parts
            case _:
                return header, parts

    def sent(
        self, frame: Frame, remote: PeerId, tell: Callable[[FrameHeader, bytes], None]
    ) -> Iterator[Frame]:
        """What goes onto a stream in the place of a frame.

        Args:
            frame: that the server sends.
            remote: to whom.
            tell: sends a frame to the client of the frame's session, if it is not `remote`.
        """
        header, payload = frame
        rng = self._rng
        lies_about = FrameType.OPENED if self.kind == "refuse" else FrameType.STEP
        is_sealed = self.kind in _SEALED_LIES
        if is_sealed or header.type is not lies_about or rng.random() >= self._rate:
            yield frame
            return
        self._told[self.kind] += 1
        match self.kind:
            case "refuse":
                yield self._error(FrameType.ERROR, header, "")
            case "bits":
                yield header, _flipped(payload, rng)
            case "repeat":
                yield frame
                yield frame
            case "drop":
                pass
            case "stall":
                self._rate = 1.0
            case "noise":
                yield frame
                kind = rng.choice(list(FrameType))
                noise = rng.randbytes(rng.choice((0, 1, 60, 1000)))
                yield replace(header, type=kind, shape=(), payload_bytes=len(noise)), noise
            case "accuse":
                accused = rng.choice([*self._neighbours, remote])
                kind = rng.choice((FrameType.ERROR, FrameType.NEXT_HOP_LOST))
                tell(*self._error(kind, header, accused))
                yield frame
            case _:
                yield frame

    def _error(self, kind: FrameType, header: FrameHeader, accused: PeerId) -> Frame:
        retry_after_s = self._rng.choice((0.0, 1.0, 3600.0))
        error: PlanetServeError = error_from_code(self._rng.choice(_CODES), "", retry_after_s)
        payload = error_reply(error, accused).encode()
        return FrameHeader(kind, session=header.session, edge=header.edge), payload


class LyingSealer:
    """A sealer whose server may lie; a `Sealer`.

    Args:
        sealer: the true one.
        liar: gives who lies now, if the server does.
    """

    def __init__(self, sealer: Sealer, liar: Callable[[], Liar | None]):
        self._sealer = sealer
        self._liar = liar

    def seal(
        self, header: FrameHeader, parts: Sequence[Buffer], now_s: float
    ) -> tuple[FrameHeader, bytes]:
        liar = self._liar()
        if liar is not None:
            header, parts = liar.before_sealing(header, parts)
        return self._sealer.seal(header, parts, now_s)

    def erase(self) -> None:
        self._sealer.erase()


def new_lying_sender(liar: Callable[[], Liar | None]) -> Callable[..., StepSender]:
    """What makes the senders of a server that may lie; `liar` as for `LyingSealer`."""

    def new_sealer(*args: Any) -> Sealer:
        return LyingSealer(EdgeSealer(*args), liar)

    return functools.partial(StepSender, new_sealer=new_sealer)


def _altered(part: Buffer, rng: random.Random, value: float) -> bytes:
    numbers = np.frombuffer(part, dtype=np.float32).copy()
    if len(numbers):
        numbers[rng.randrange(len(numbers))] = value
    return numbers.tobytes()


def _flipped(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)
