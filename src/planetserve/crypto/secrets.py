"""The secret that a client and a hop share for one session, and the edge secrets that the client
sends over it.

A `ChannelSecret` is made by a handshake and never leaves the process. The client draws one secret
per edge of the ring and seals to each hop the two that the hop needs: of the edge that enters it
and of the edge that leaves it. Hops never agree on keys with each other, so replacing a hop takes
only new secrets under the next epoch. Bytes in, bytes out: this module neither sends nor keeps
time.

Messages of a channel are opened in the order in which they were sealed, each once; the first that
fails closes the channel. Secrets are held in bytearrays and overwritten as soon as keys have been
derived from them; `erase` drops the keys, of which only OpenSSL has copies, and OpenSSL clears
those. Python cannot do more: the results of `os.urandom` and of the key exchange are immutable and
stay in freed memory until it is reused.

AES-256-GCM as in RFC 5116 section 5.2, nonces as in its section 3.2: 4 fixed bytes, then a counter.
"""

from __future__ import annotations

import hashlib
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from typing_extensions import override

from planetserve.errors import DecryptionFailed, LocalProtocolError
from planetserve.wire.frame import Direction

SECRET_BYTES = 32
TAG_BYTES = 16
KEY_BYTES = 32
SALT_BYTES = 4

_CHANNEL_INFO = b"planetserve/1 channel"
_EDGE_KEYS_LABEL = b"planetserve/1 deal"
_EDGE_KEYS = struct.Struct(">I32s32s")
EDGE_KEYS_BYTES = _EDGE_KEYS.size + TAG_BYTES
"""Length of sealed edge keys."""


def new_edge_secret() -> bytearray:
    """A fresh random secret for one edge in one epoch, `SECRET_BYTES` long."""
    return bytearray(os.urandom(SECRET_BYTES))


def wipe(*secrets: bytearray) -> None:
    """Overwrite secrets with zeros, in place."""
    for secret in secrets:
        secret[:] = bytes(len(secret))


def decryption_failed() -> DecryptionFailed:
    """The error for anything that cannot be opened; its text gives a forger no information."""
    return DecryptionFailed("a sealed message was refused")


class ChannelSecret:
    """One end of the protected channel between a client and a hop.

    Args:
        secret: `SECRET_BYTES` from the handshake; overwritten here.
        sends: the direction of what this end seals: FORWARD at the client, BACKWARD at the hop.
    """

    def __init__(self, secret: bytearray, sends: Direction):
        self._outgoing = _Cipher(secret, sends)
        self._incoming = _Cipher(secret, Direction(1 - sends))
        wipe(secret)
        self.keys_epoch = -1
        """The epoch of the latest edge keys that passed through this end; it only goes up."""

    def seal(self, plaintext: bytes | bytearray, context: bytes) -> bytes:
        """The next message to the other end, `TAG_BYTES` longer than `plaintext`.

        Raises:
            LocalProtocolError: the channel has been erased.
        """
        return self._outgoing.seal(plaintext, context)

    def open(self, blob: bytes | bytearray | memoryview, context: bytes) -> bytearray:
        """The plaintext of the next message from the other end; the caller wipes it.

        Raises:
            DecryptionFailed: not the next message, not for `context`, or not from the other end.
                The channel is erased: nothing more can be opened or sealed.
        """
        try:
            return self._incoming.open(blob, context)
        except DecryptionFailed:
            self.erase()
            raise

    def erase(self) -> None:
        """Drop the keys: nothing more can be sealed or opened. Idempotent."""
        self._outgoing.erase()
        self._incoming.erase()

    @override
    def __repr__(self) -> str:
        return f"ChannelSecret({'erased' if self._outgoing.erased else 'live'})"


def seal_edge_keys(
    channel: ChannelSecret,
    epoch: int,
    inbound_secret: bytes | bytearray,
    outbound_secret: bytes | bytearray,
    rewire: bytes | bytearray | memoryview = b"",
) -> bytes:
    """What the client sends to a hop: the secrets of its two edges from `epoch` on.

    `rewire` is the payload of the REWIRE frame that the keys belong to, if any; they open only
    together with it.

    Raises:
        LocalProtocolError: a secret of another length, an epoch that is not later than that
            of the last ones, or a channel that has been erased.
    """
    if len(inbound_secret) != SECRET_BYTES or len(outbound_secret) != SECRET_BYTES:
        raise LocalProtocolError(f"an edge secret has {SECRET_BYTES} bytes")
    if not channel.keys_epoch < epoch < 1 << 32:
        raise LocalProtocolError(f"epoch {epoch} cannot follow epoch {channel.keys_epoch}")
    plaintext = bytearray(_EDGE_KEYS.size)
    _EDGE_KEYS.pack_into(plaintext, 0, epoch, inbound_secret, outbound_secret)
    try:
        blob = channel.seal(plaintext, _edge_keys_context(rewire))
    finally:
        wipe(plaintext)
    channel.keys_epoch = epoch
    return blob


def open_edge_keys(
    channel: ChannelSecret,
    blob: bytes | bytearray | memoryview,
    rewire: bytes | bytearray | memoryview = b"",
) -> tuple[int, bytearray, bytearray]:
    """The epoch of edge keys, and the secrets of the edges that enter and leave this hop.

    The caller makes its openers and sealers of them and wipes them. `rewire` is the payload of the
    REWIRE frame that came before it, if any.

    Raises:
        DecryptionFailed: forged, replayed, out of order, not later than the last ones, or
            of another REWIRE. The channel is erased.
    """
    plaintext = channel.open(blob, _edge_keys_context(rewire))
    try:
        epoch = int.from_bytes(plaintext[:4], "big")
        if len(plaintext) != _EDGE_KEYS.size or epoch <= channel.keys_epoch:
            channel.erase()
            raise decryption_failed()
        channel.keys_epoch = epoch
        return epoch, plaintext[4 : 4 + SECRET_BYTES], plaintext[4 + SECRET_BYTES :]
    finally:
        wipe(plaintext)


def _edge_keys_context(rewire: bytes | bytearray | memoryview) -> bytes:
    return _EDGE_KEYS_LABEL + hashlib.sha256(rewire).digest() if rewire else _EDGE_KEYS_LABEL


class _Cipher:
    """One direction of a channel: a key, a salt and the number of the next message."""

    def __init__(self, secret: bytearray, direction: Direction):
        # The channel secret is uniform already, so HKDF's second half is enough: RFC 5869, 3.3.
        info = _CHANNEL_INFO + bytes([direction])
        material = bytearray(KEY_BYTES + SALT_BYTES)
        HKDFExpand(hashes.SHA256(), len(material), info).derive_into(secret, material)
        self._aead: AESGCM | None = AESGCM(memoryview(material)[:KEY_BYTES])
        self._salt = bytes(material[KEY_BYTES:])
        self._counter = 0
        wipe(material)

    @property
    def erased(self) -> bool:
        return self._aead is None

    def seal(self, plaintext: bytes | bytearray, context: bytes) -> bytes:
        if self._aead is None:
            raise LocalProtocolError("this channel is closed and its keys are gone")
        return self._aead.encrypt(self._next_nonce(), plaintext, context)

    def open(self, blob: bytes | bytearray | memoryview, context: bytes) -> bytearray:
        if self._aead is None or len(blob) < TAG_BYTES:
            raise decryption_failed()
        plaintext = bytearray(len(blob) - TAG_BYTES)
        try:
            self._aead.decrypt_into(self._next_nonce(), blob, context, plaintext)
        except InvalidTag:
            raise decryption_failed() from None
        return plaintext

    def erase(self) -> None:
        self._aead = None

    def _next_nonce(self) -> bytes:
        # Advanced before it is used, so no failure can make a nonce be used twice.
        nonce = self._salt + self._counter.to_bytes(8, "big")
        self._counter += 1
        return nonce
