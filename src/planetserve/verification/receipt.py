"""A receipt: what a hop has taken in and sent on in a session, under its signature.

A hop signs one after every `RECEIPT_STEPS` steps and one at the end of the session. It binds the
hop to the bytes of both its edges: whoever holds the bytes can show what it has computed from what.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from planetserve.crypto.identity import SIGNATURE_BYTES, Identity, verify
from planetserve.errors import LocalProtocolError, RemoteProtocolError
from planetserve.types import PeerId
from planetserve.verification.digest import EdgeState
from planetserve.wire.frame import WireDtype

RECEIPT_STEPS = 32
"""Steps after which a hop signs again: a session that breaks loses fewer."""

_CONTEXT = b"session receipt"
_VERSION = 1
_HEAD = struct.Struct(">B16s32sHHBB32sIB")
_EDGE = struct.Struct(">HIIQ32s32s")
_TIMES = struct.Struct(">QQ")
BODY_BYTES = _HEAD.size + 2 * _EDGE.size + _TIMES.size
RECEIPT_BYTES = BODY_BYTES + SIGNATURE_BYTES

_QUANT_CODES = {"none": 0, "int8": 1, "nf4": 2}
_OTHER_QUANT = 255
_DTYPES = {int(dtype): dtype for dtype in WireDtype if dtype is not WireDtype.NONE}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the hop says. Times are Unix times in milliseconds, by its own clock."""

    session_id: bytes
    nonce: bytes
    """32 bytes that the client has chosen: the offer in the hop's OPEN."""
    start: int
    end: int
    """The blocks that the hop runs."""
    dtype: WireDtype
    """Of the activations."""
    quant: int
    """Code of what the hop has made of the weights as they are stored; see `quant_code`."""
    manifest: bytes
    """Hash of the manifest of its weights; zeros if it does not know it."""
    number: int
    """Of this receipt among those of the session at the hop, from 0."""
    is_final: bool
    incoming: EdgeState
    outgoing: EdgeState
    opened_ms: int
    signed_ms: int

    def sign(self, identity: Identity) -> bytes:
        """The receipt's `RECEIPT_BYTES` bytes.

        Raises:
            LocalProtocolError: a number does not fit its field.
        """
        try:
            body = b"".join(
                (
                    _HEAD.pack(
                        _VERSION, self.session_id, self.nonce, self.start, self.end,
                        self.dtype, self.quant, self.manifest, self.number, self.is_final,
                    ),
                    _pack(self.incoming),
                    _pack(self.outgoing),
                    _TIMES.pack(self.opened_ms, self.signed_ms),
                )
            )  # fmt: skip
        except struct.error as error:
            raise LocalProtocolError(f"a receipt's field is out of range: {error}") from error
        return body + identity.sign(_CONTEXT, body)

    @classmethod
    def open(cls, data: bytes | bytearray, signer: PeerId) -> Receipt:
        """Check and read a receipt of `signer`.

        Raises:
            RemoteProtocolError: it is no receipt, or somebody else's.
        """
        if len(data) != RECEIPT_BYTES:
            raise RemoteProtocolError(f"a receipt has {RECEIPT_BYTES} bytes, got {len(data)}")
        body = bytes(data[:BODY_BYTES])
        if not verify(signer, _CONTEXT, body, bytes(data[BODY_BYTES:])):
            raise RemoteProtocolError("a receipt that its server has not signed")
        version, session_id, nonce, start, end, dtype, quant, manifest, number, final = (
            _HEAD.unpack_from(body)
        )
        if version != _VERSION or final > 1 or dtype not in _DTYPES:
            raise RemoteProtocolError("a receipt of another version, or of no dtype")
        incoming = EdgeState(*_EDGE.unpack_from(body, _HEAD.size))
        outgoing = EdgeState(*_EDGE.unpack_from(body, _HEAD.size + _EDGE.size))
        opened_ms, signed_ms = _TIMES.unpack_from(body, BODY_BYTES - _TIMES.size)
        return cls(
            session_id, nonce, start, end, _DTYPES[dtype], quant, manifest, number, bool(final),
            incoming, outgoing, opened_ms, signed_ms,
        )  # fmt: skip


def quant_code(quant_type: str) -> int:
    """The number that stands for a `quant_type` in receipts."""
    return _QUANT_CODES.get(quant_type, _OTHER_QUANT)


def _pack(state: EdgeState) -> Any:
    return _EDGE.pack(
        state.edge, state.epoch, state.next_step, state.num_tokens, state.chain, state.rows
    )
