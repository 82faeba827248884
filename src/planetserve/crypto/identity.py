"""A node's long-term Ed25519 key: its file, its peer id, its signatures.

The key is stored in libp2p's own key-file format, so the libp2p daemon and this module read the
same file. The peer id of an Ed25519 key contains the public key: a signature is checked against the
peer id alone, with no certificate and no look-up.

Every signature is made for a context (what the bytes are: "directory record", "receipt"), so that a
signature for one purpose is never valid for another. This module opens no connection and imports
neither torch nor hivemind.

Formats: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typing_extensions import override

from planetserve.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

SIGNATURE_BYTES = 64

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUES = {letter: value for value, letter in enumerate(_BASE58)}
# Protobuf PrivateKey{Type = Ed25519, Data = 64 bytes} and identity multihash of PublicKey{...}.
_KEY_FILE_PREFIX = bytes.fromhex("08011240")
_RSA_KEY_FILE_PREFIX = bytes.fromhex("0800")
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_KEY_FILE_BYTES = len(_KEY_FILE_PREFIX) + 64
_PEER_ID_BYTES = len(_PEER_ID_PREFIX) + 32
_MAX_PEER_ID_CHARS = 64
_MAX_CONTEXT_BYTES = 255


class Identity:
    """One node's key pair. Its repr shows the peer id, never the key."""

    def __init__(self, private_key: Ed25519PrivateKey):
        self._key = private_key
        self._public = private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id: PeerId = peer_id_of(self._public)

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity that exists in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Read the key file at `path`, or write a new key there (mode 0600) if nothing is there.

        Raises:
            ConfigError: the file cannot be read or written, or holds no Ed25519 key.
        """
        path = Path(path)
        if not path.exists():
            identity = cls.generate()
            try:
                identity.save(path)
            except ConfigError:
                if not path.exists():
                    raise
                # Another process created it meanwhile: use its key.
            else:
                return identity
        return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> Identity:
        try:
            with path.open("rb") as file:
                data = file.read(1 << 16)
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise ConfigError(f"cannot read the identity file {path}: {error.strerror}") from error
        if data.startswith(_RSA_KEY_FILE_PREFIX):
            raise ConfigError(
                f"the identity file {path} holds an RSA key, and PlanetServe identities are "
                "Ed25519 keys; choose another --identity_path and a new key is written there"
            )
        if len(data) != _KEY_FILE_BYTES or not data.startswith(_KEY_FILE_PREFIX):
            raise ConfigError(
                f"{path} is not an identity file; choose another --identity_path, "
                "or remove the file and a new key is written there"
            )
        seed, public = data[len(_KEY_FILE_PREFIX) :][:32], data[-32:]
        identity = cls(Ed25519PrivateKey.from_private_bytes(seed))
        if identity._public != public:
            raise ConfigError(f"the identity file {path} is damaged: its two halves do not match")
        if mode & 0o077:
            logger.warning("identity file %s can be read by others; run: chmod 600 %s", path, path)
        return identity

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key file (mode 0600), whole or not at all. An existing file is never replaced.

        Raises:
            ConfigError: the file exists or its folder cannot be written to.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(self._key_file())
                    file.flush()
                    os.fsync(file.fileno())
                # A hard link, unlike a rename, fails when the name is taken.
                os.link(scratch, path)
            finally:
                os.unlink(scratch)
        except OSError as error:
            raise ConfigError(
                f"cannot write the identity file {path}: {error.strerror}; "
                "choose another --identity_path"
            ) from error

    def _key_file(self) -> bytes:
        seed = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return _KEY_FILE_PREFIX + seed + self._public

    def sign(self, context: bytes, message: bytes) -> bytes:
        """A 64-byte Ed25519 signature over `message` made for `context` only.

        Raises:
            LocalProtocolError: the context is empty or longer than 255 bytes.
        """
        return self._key.sign(_signed_bytes(context, message))

    @override
    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def verify(peer_id: PeerId, context: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `message` for `context`; remote data never raises."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))
        key.verify(signature, _signed_bytes(context, message))
    except (InvalidSignature, RemoteProtocolError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=1024)
def public_key_of(peer_id: PeerId) -> bytes:
    """The 32-byte Ed25519 public key inside a peer id.

    Raises:
        RemoteProtocolError: it is no peer id, or one of another kind of key.
    """
    data = _base58_decode(peer_id)
    if not is_peer_id(data):
        raise RemoteProtocolError("a peer id does not contain an Ed25519 key (12D3KooW...)")
    return data[len(_PEER_ID_PREFIX) :]


def peer_id_bytes(peer_id: PeerId) -> bytes:
    """The binary form (multihash) of an Ed25519 peer id.

    Raises:
        RemoteProtocolError: it is no peer id, or one of another kind of key.
    """
    return _PEER_ID_PREFIX + public_key_of(peer_id)


def is_peer_id(data: bytes) -> bool:
    """Whether these bytes can be the binary form of an Ed25519 peer id."""
    return len(data) == _PEER_ID_BYTES and data.startswith(_PEER_ID_PREFIX)


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte Ed25519 public key."""
    number = int.from_bytes(_PEER_ID_PREFIX + public_key, "big")
    letters = ""
    while number:
        number, digit = divmod(number, 58)
        letters = _BASE58[digit] + letters
    # The multihash starts with one zero byte, which base58 writes as one "1".
    return "1" + letters


def _base58_decode(text: str) -> bytes:
    if not 0 < len(text) <= _MAX_PEER_ID_CHARS:
        raise RemoteProtocolError(f"a peer id has at most {_MAX_PEER_ID_CHARS} letters")
    number = 0
    for letter in text:
        value = _BASE58_VALUES.get(letter)
        if value is None:
            raise RemoteProtocolError("a peer id is not base58")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _signed_bytes(context: bytes, message: bytes) -> bytes:
    if not 0 < len(context) <= _MAX_CONTEXT_BYTES:
        raise LocalProtocolError(f"a signature context has 1 to {_MAX_CONTEXT_BYTES} bytes")
    return b"planetserve" + bytes([len(context)]) + context + message


@contextlib.contextmanager
def claimed(key_file: Path) -> Iterator[None]:
    """Hold a lock on the key file: two nodes with one peer id would break each other's
    connections."""
    with key_file.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"identity file {key_file} is used by another running node; "
                "give each node an --identity_path of its own"
            ) from None
        yield
