"""Receipts: the bytes of docs/protocol.md, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from planetserve.crypto.identity import Identity, verify
from planetserve.edge.chunk import StepChunk
from planetserve.errors import LocalProtocolError, RemoteProtocolError
from planetserve.verification.digest import EdgeDigest, EdgeState
from planetserve.verification.receipt import (
    BODY_BYTES,
    RECEIPT_BYTES,
    Receipt,
    quant_code,
)
from planetserve.wire.frame import WireDtype
from planetserve.wire.step import RowSlice, StepTable

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
# RFC 8032, section 7.1, test 1.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
HOP = Identity(Ed25519PrivateKey.from_private_bytes(SEED))
SESSION = bytes(range(16))


def vector_state(edge: int) -> EdgeState:
    """The step of the page: two rows exchanged, then one token at place 7 and two at place 0."""
    digest = EdgeDigest(SESSION, 2)
    digest.start(edge, 0, 5)
    hidden_TD = torch.arange(6, dtype=torch.float32).view(3, 2)
    table = StepTable((RowSlice(0, 7, 1), RowSlice(1, 0, 2)), None, (1, 0))
    digest(StepChunk(5, 0, 1, 0, table, hidden_TD), memoryview(hidden_TD.numpy()).cast("B"))
    return digest.state(with_rows=True)


RECEIPT = Receipt(
    session_id=SESSION,
    nonce=bytes(range(32, 64)),
    start=4,
    end=8,
    dtype=WireDtype.FLOAT32,
    quant=0,
    manifest=bytes(range(64, 96)),
    number=1,
    is_final=True,
    incoming=vector_state(1),
    outgoing=vector_state(2),
    opened_ms=1_700_000_000_000,
    signed_ms=1_700_000_001_000,
)


def test_the_vectors_are_printed() -> None:
    squeezed = "".join(PAGE.split())
    data = RECEIPT.sign(HOP)
    state = RECEIPT.incoming
    assert state.chain.hex() in squeezed
    assert state.rows.hex() in squeezed
    assert data.hex() in squeezed
    assert f"a receipt, {RECEIPT_BYTES} bytes" in PAGE


def h(*parts: bytes) -> bytes:
    return blake3(b"".join(parts)).digest()


def u(size: int, *numbers: int) -> bytes:
    return b"".join(number.to_bytes(size, "big") for number in numbers)


def test_the_vector_follows_from_the_page() -> None:
    """Its formulas once more, written down plainly."""
    tokens = [h(struct.pack("<2f", *pair)) for pair in ((0, 1), (2, 3), (4, 5))]
    places = [(0, 7), (1, 0), (1, 1)]
    step = h(
        b"planetserve step 1", u(4, 5), u(2, 2), u(4, 3), u(2, 1, 0),
        *(u(2, row) + u(4, place, place) + token
          for (row, place), token in zip(places, tokens, strict=True)),
    )  # fmt: skip
    start = h(b"planetserve edge 1", SESSION, u(2, 1), u(4, 0))
    assert RECEIPT.incoming.chain == h(start, step)
    first = h(u(4, 7, 1), u(4, 7), tokens[0])
    second = h(u(4, 0, 2), u(4, 0), tokens[1], u(4, 1), tokens[2])
    assert RECEIPT.incoming.rows == h(b"planetserve rows 1", first, second)


def test_a_receipt_is_read_as_it_was_signed() -> None:
    data = RECEIPT.sign(HOP)
    assert len(data) == RECEIPT_BYTES
    assert Receipt.open(data, HOP.peer_id) == RECEIPT
    assert not verify(HOP.peer_id, b"session handshake", data[:BODY_BYTES], data[BODY_BYTES:])


@given(st.integers(0, 8 * RECEIPT_BYTES - 1))
def test_any_changed_bit_is_noticed(bit: int) -> None:
    data = bytearray(RECEIPT.sign(HOP))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        Receipt.open(data, HOP.peer_id)


@given(st.binary(max_size=2 * RECEIPT_BYTES))
def test_junk_is_no_receipt(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Receipt.open(data, HOP.peer_id)


@given(st.binary(min_size=BODY_BYTES, max_size=BODY_BYTES))
def test_signed_junk_is_refused_or_a_receipt(body: bytes) -> None:
    data = body + HOP.sign(b"session receipt", body)
    try:
        receipt = Receipt.open(data, HOP.peer_id)
    except RemoteProtocolError:
        return
    assert receipt.sign(HOP) == data


@pytest.mark.parametrize(("offset", "value"), [(0, 2), (53, 0), (53, 9), (91, 2)])
def test_signed_fields_out_of_range_are_refused(offset: int, value: int) -> None:
    body = bytearray(RECEIPT.sign(HOP)[:BODY_BYTES])
    body[offset] = value
    with pytest.raises(RemoteProtocolError, match="version"):
        Receipt.open(bytes(body) + HOP.sign(b"session receipt", bytes(body)), HOP.peer_id)


def test_the_receipt_of_another_is_refused() -> None:
    other = Identity.generate()
    with pytest.raises(RemoteProtocolError, match="not signed"):
        Receipt.open(RECEIPT.sign(other), HOP.peer_id)


def test_numbers_that_do_not_fit_are_not_signed() -> None:
    with pytest.raises(LocalProtocolError):
        dataclasses.replace(RECEIPT, number=2**32).sign(HOP)


def test_quantisations_have_codes() -> None:
    assert [quant_code(name) for name in ("none", "int8", "nf4", "int3")] == [0, 1, 2, 255]
