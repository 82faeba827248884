"""One direction of one edge of the ring in one epoch: one end seals frames, the other opens them.

A frame's packed header is the associated data of its payload, so no field of it can be changed, and
its sequence number must be the very next one, so no frame can be dropped, repeated or moved. After
the first frame that does not open, the opener refuses all others. Time is passed in; nothing here
sends.

AES-256-GCM (RFC 5116, 5.2). Nonce: 4 bytes from the key derivation, then the sequence number (RFC
5116, 3.2), so it repeats only if one secret is used for two sealers of the same direction. Use each
secret for one sealer, and send a new secret for the next. Key and salt: HKDF-SHA256 (RFC 5869) over
the edge secret. The limits of a key keep an attacker's advantage under 2**-64
(draft-irtf-cfrg-aead-limits, 5.1.1).

GCM does not commit to its key: one ciphertext can open to two plaintexts under two keys, so a
ciphertext is no proof of what an edge has carried.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from planetserve.crypto.secrets import (
    KEY_BYTES,
    SALT_BYTES,
    SECRET_BYTES,
    TAG_BYTES,
    decryption_failed,
    wipe,
)
from planetserve.errors import DecryptionFailed, LocalProtocolError, RekeyNeeded
from planetserve.wire.frame import MAX_STEP_BYTES, SESSION_BYTES, Direction, FrameHeader

MAX_FRAMES = 1 << 20
MAX_BYTES = 64 << 30
MAX_AGE_S = 3600.0
MAX_PLAINTEXT_BYTES = MAX_STEP_BYTES - TAG_BYTES
"""Longest plaintext of a STEP frame: its cap counts the tag."""

_EDGE_INFO = b"planetserve/1 edge"
_EDGE = struct.Struct(">16sHIB")

Buffer = bytes | bytearray | memoryview


class Sealer(Protocol):
    """What a sender of frames needs of its end of an edge; see `EdgeSealer`."""

    def seal(
        self, header: FrameHeader, parts: Sequence[Buffer], now_s: float
    ) -> tuple[FrameHeader, bytes]: ...

    def erase(self) -> None: ...


class EdgeSealer:
    """The sending end.

    Args:
        edge_secret: `SECRET_BYTES` of this edge and epoch; not kept.
        session_id, edge, epoch, direction: what every sealed header must say.
        now_s: monotonic time, from which the key's age counts.

    Raises:
        LocalProtocolError: a secret of another length, or a number out of range.
    """

    def __init__(
        self,
        edge_secret: bytes | bytearray,
        session_id: bytes,
        edge: int,
        epoch: int,
        direction: Direction,
        now_s: float,
    ):
        self._aead: AESGCM | None
        self._aead, self._salt = _derive(edge_secret, session_id, edge, epoch, direction)
        self._name = (session_id, edge, epoch, direction)
        self._sequence = 0
        self._num_bytes = 0
        self._since_s = now_s

    def seal(
        self, header: FrameHeader, parts: Sequence[Buffer], now_s: float
    ) -> tuple[FrameHeader, bytes]:
        """The frame to send.

        Args:
            header: its `sequence` and `payload_bytes` are filled in here.
            parts: the plaintext, in pieces that follow one another.
            now_s: monotonic time.

        Raises:
            RekeyNeeded: the key is used up: `MAX_FRAMES`, `MAX_BYTES` or `MAX_AGE_S`.
            LocalProtocolError: the header is of another edge or out of range, the payload is over
                its cap, or the keys have been erased.
        """
        if self._aead is None:
            raise LocalProtocolError("this edge is closed and its keys are gone")
        if (header.session, header.edge, header.epoch, header.direction) != self._name:
            raise LocalProtocolError("a frame of another session, edge, epoch or direction")
        plaintext = parts[0] if len(parts) == 1 else b"".join(parts)
        num_bytes = memoryview(plaintext).nbytes
        sequence = self._sequence
        if (
            sequence >= MAX_FRAMES
            or self._num_bytes + num_bytes > MAX_BYTES
            or now_s - self._since_s >= MAX_AGE_S
        ):
            raise RekeyNeeded("the key of this edge is used up; go on in a new epoch")
        header = header.numbered(sequence, num_bytes + TAG_BYTES)
        associated = header.pack()
        # Advanced before the nonce is used, so no failure can make a nonce be used twice.
        self._sequence = sequence + 1
        self._num_bytes += num_bytes
        nonce = self._salt + sequence.to_bytes(8, "big")
        return header, self._aead.encrypt(nonce, plaintext, associated)

    def erase(self) -> None:
        """Drop the key. Idempotent; nothing can be sealed any more."""
        self._aead = None


class EdgeOpener:
    """The receiving end; the arguments are those of `EdgeSealer`.

    Frames of an earlier epoch may still be under way after a new one has begun: the caller drops
    those by their header before they come here.
    """

    def __init__(
        self,
        edge_secret: bytes | bytearray,
        session_id: bytes,
        edge: int,
        epoch: int,
        direction: Direction,
    ):
        self._aead: AESGCM | None
        self._aead, self._salt = _derive(edge_secret, session_id, edge, epoch, direction)
        self._name = (session_id, edge, epoch, direction)
        self._sequence = 0

    @property
    def failed(self) -> bool:
        """Whether this end opens nothing any more: a frame was refused, or it was erased."""
        return self._aead is None

    def open(self, header: FrameHeader, payload: Buffer) -> bytearray:
        """The plaintext, in a new buffer that starts where a tensor of any dtype may start.

        Raises:
            DecryptionFailed: not the next frame of this edge, or not what was sealed. Every later
                call raises it too: a forger has one try.
        """
        try:
            return self._open(header, payload)
        except DecryptionFailed:
            self.erase()
            raise

    def _open(self, header: FrameHeader, payload: Buffer) -> bytearray:
        sequence = self._sequence
        num_bytes = len(payload) - TAG_BYTES
        if (
            self._aead is None
            or (header.session, header.edge, header.epoch, header.direction) != self._name
            or header.sequence != sequence
            or len(payload) != header.payload_bytes
            or num_bytes < 0
        ):
            raise decryption_failed()
        plaintext = bytearray(num_bytes)
        nonce = self._salt + sequence.to_bytes(8, "big")
        try:
            self._aead.decrypt_into(nonce, payload, header.pack(), plaintext)
        except (InvalidTag, LocalProtocolError):
            raise decryption_failed() from None
        self._sequence = sequence + 1
        return plaintext

    def erase(self) -> None:
        """Drop the key. Idempotent; nothing can be opened any more."""
        self._aead = None


def _derive(
    edge_secret: bytes | bytearray, session_id: bytes, edge: int, epoch: int, direction: Direction
) -> tuple[AESGCM, bytes]:
    """The cipher of one direction and the first four bytes of its nonces."""
    if len(edge_secret) != SECRET_BYTES or len(session_id) != SESSION_BYTES:
        raise LocalProtocolError(
            f"an edge secret has {SECRET_BYTES} bytes and a session id {SESSION_BYTES}"
        )
    try:
        info = _EDGE_INFO + _EDGE.pack(session_id, edge, epoch, direction)
    except struct.error as error:
        raise LocalProtocolError(f"an edge field is out of range: {error}") from error
    material = bytearray(KEY_BYTES + SALT_BYTES)
    HKDF(hashes.SHA256(), len(material), salt=None, info=info).derive_into(edge_secret, material)
    aead = AESGCM(memoryview(material)[:KEY_BYTES])
    salt = bytes(material[KEY_BYTES:])
    wipe(material)
    return aead, salt
