"""Opening a session with one hop: an ephemeral key exchange that the hop signs; one round trip.

The client puts an ephemeral X25519 public key (the offer) into its OPEN; the hop answers in OPENED
with its own (the answer) and an Ed25519 signature over the transcript: session, edge, its peer id,
the exact bytes of OPEN, and both ephemeral keys. If any of it is changed on the way, the handshake
fails. Both sides then hold the same `ChannelSecret`.

Only the hop is authenticated here. The hop knows the client's peer id from the libp2p connection,
and the first message with edge secrets proves that the client holds the channel's secret. Ephemeral
keys are used once and dropped, so a stolen identity key opens no earlier session.

X25519: RFC 7748, 6.1. HKDF: RFC 5869. Ed25519: RFC 8032. Sans-I/O: the client's ring and the
server's handler carry the bytes.
"""

from __future__ import annotations

import hashlib
import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from planetserve.crypto.identity import Identity, verify
from planetserve.crypto.secrets import SECRET_BYTES, ChannelSecret
from planetserve.errors import HandshakeFailed, LocalProtocolError
from planetserve.types import PeerId
from planetserve.wire.frame import SESSION_BYTES, Direction

PUBLIC_KEY_BYTES = 32

_LABEL = b"planetserve/1 handshake"
_SIGNATURE_CONTEXT = b"session handshake"
_SECRET_INFO = b"planetserve/1 secret"


class ClientHandshake:
    """The client's side of one handshake. Used once.

    Args:
        session_id: the session's 16 bytes.
        edge: the edge that enters the hop.
        hop_peer_id: who must answer.
    """

    def __init__(self, session_id: bytes, edge: int, hop_peer_id: PeerId):
        self._session_id = session_id
        self._edge = edge
        self._hop_peer_id = hop_peer_id
        self._key: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.offer: bytes = self._key.public_key().public_bytes_raw()
        """The ephemeral public key that goes into OPEN, `PUBLIC_KEY_BYTES` long."""

    def finish(self, open_payload: bytes, answer: bytes, signature: bytes) -> ChannelSecret:
        """Check the hop's answer and derive the channel.

        Args:
            open_payload: the payload of the OPEN frame exactly as it was sent.
            answer: the hop's ephemeral public key.
            signature: the hop's signature over the transcript.

        Raises:
            HandshakeFailed: the answer is not that of `hop_peer_id` to this very OPEN.
            LocalProtocolError: the handshake has been finished already, or the session id or edge
                is out of range.
        """
        key, self._key = self._key, None
        if key is None:
            raise LocalProtocolError("a handshake serves once; begin another")
        transcript = _transcript(
            self._session_id, self._edge, self._hop_peer_id, open_payload, self.offer, answer
        )
        if not verify(self._hop_peer_id, _SIGNATURE_CONTEXT, transcript, signature):
            raise _failed(self._hop_peer_id, "the hop's signature is not its peer id's")
        try:
            return _derive(key, answer, transcript, Direction.FORWARD)
        except ValueError as error:
            raise _failed(self._hop_peer_id, "the hop's ephemeral key is no key") from error


def answer_open(
    identity: Identity, session_id: bytes, edge: int, open_payload: bytes, offer: bytes
) -> tuple[bytes, bytes, ChannelSecret]:
    """The hop's side: its ephemeral public key, its signature, and its end of the channel.

    Args:
        identity: the hop's own.
        session_id: from the OPEN frame's header, as is `edge`.
        edge: the edge that enters this hop.
        open_payload: the payload of the OPEN frame exactly as it came.
        offer: the client's ephemeral public key, read from that payload.

    Raises:
        HandshakeFailed: the offer is no X25519 public key, or one of low order.
        LocalProtocolError: the session id or edge is out of range.
    """
    key = X25519PrivateKey.generate()
    answer = key.public_key().public_bytes_raw()
    transcript = _transcript(session_id, edge, identity.peer_id, open_payload, offer, answer)
    try:
        channel = _derive(key, offer, transcript, Direction.BACKWARD)
    except ValueError as error:
        raise HandshakeFailed("the client's ephemeral key is no key") from error
    return answer, identity.sign(_SIGNATURE_CONTEXT, transcript), channel


def _transcript(
    session_id: bytes, edge: int, peer_id: PeerId, open_payload: bytes, offer: bytes, answer: bytes
) -> bytes:
    """SHA-256 over everything that both sides must agree on, encoded without ambiguity.

    The label, numbers and keys have fixed lengths, peer id and payload are preceded by theirs.
    """
    if len(session_id) != SESSION_BYTES:
        raise LocalProtocolError(f"a session id has {SESSION_BYTES} bytes")
    peer = peer_id.encode()
    try:
        head = struct.pack(">16sHH", session_id, edge, len(peer)) + peer
    except struct.error as error:
        raise LocalProtocolError(f"a handshake field is out of range: {error}") from error
    parts = (_LABEL, head, struct.pack(">I", len(open_payload)), open_payload, offer, answer)
    return hashlib.sha256(b"".join(parts)).digest()


def _derive(
    key: X25519PrivateKey, public: bytes, transcript: bytes, sends: Direction
) -> ChannelSecret:
    # `exchange` raises ValueError when the shared secret is all zero, which is what a public key of
    # low order leads to (RFC 7748, 6.1); `from_public_bytes` when there are not 32 bytes.
    shared = key.exchange(X25519PublicKey.from_public_bytes(public))
    secret = bytearray(SECRET_BYTES)
    HKDF(hashes.SHA256(), SECRET_BYTES, salt=transcript, info=_SECRET_INFO).derive_into(
        shared, secret
    )
    return ChannelSecret(secret, sends)


def _failed(peer_id: PeerId, why: str) -> HandshakeFailed:
    error = HandshakeFailed(f"the handshake with …{peer_id[-6:]} failed: {why}")
    error.peer_id = peer_id
    return error
