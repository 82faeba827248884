"""Frame headers: exact bytes, round trips, and everything a stranger may send instead."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import LocalProtocolError, RemoteProtocolError, UnsupportedError
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_STEP_BYTES,
    Direction,
    FrameHeader,
    FrameType,
    WireDtype,
    payload_cap,
)

STEP = FrameHeader(
    FrameType.STEP,
    session=bytes(range(16)),
    edge=2,
    direction=Direction.BACKWARD,
    epoch=3,
    sequence=4,
    step=5,
    position=6,
    num_tokens=7,
    span_start=8,
    span_end=9,
    dtype=WireDtype.BFLOAT16,
    shape=(7, 64),
    chunk=1,
    num_chunks=2,
    payload_bytes=7 * 64 * 2 + 24,
    flags=FLAG_KEEP_LAST,
)


def altered(offset: int, value: int) -> bytes:
    data = bytearray(STEP.pack())
    data[offset] = value
    return bytes(data)


def u16(value: int) -> st.SearchStrategy[int]:
    return st.integers(0, value)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    kind = draw(st.sampled_from(FrameType))
    dtype = draw(st.sampled_from(WireDtype))
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    size = dtype.itemsize if shape else 0
    for length in shape:
        size *= length
    cap = payload_cap(kind)
    if size > cap:
        shape, size = (), 0
    num_chunks = draw(st.integers(1, 0xFFFF))
    return FrameHeader(
        kind,
        session=draw(st.binary(min_size=16, max_size=16)),
        edge=draw(u16(0xFFFF)),
        direction=draw(st.sampled_from(Direction)),
        epoch=draw(u16(2**32 - 1)),
        sequence=draw(u16(2**64 - 1)),
        step=draw(u16(2**32 - 1)),
        position=draw(u16(2**32 - 1)),
        num_tokens=draw(u16(2**32 - 1)),
        span_start=draw(u16(0xFFFF)),
        span_end=draw(u16(0xFFFF)),
        dtype=dtype,
        shape=shape,
        chunk=draw(st.integers(0, num_chunks - 1)),
        num_chunks=num_chunks,
        payload_bytes=draw(st.integers(size, cap)),
        flags=draw(st.sampled_from([0, FLAG_KEEP_LAST])),
    )


def test_the_layout_of_version_1() -> None:
    expected = (
        "0104" + f"{FLAG_KEEP_LAST:04x}" + bytes(range(16)).hex()
        + "0002" "01" "00" "00000003" "0000000000000004" "00000005" "00000006" "00000007"
        + "0008" "0009" "03" "00" "02" "00" + "00000007" "00000040" "00000000" "00000000"
        + "0001" "0002" "00000398"
    )  # fmt: skip
    assert STEP.pack().hex() == expected
    assert len(expected) == 2 * HEADER_BYTES


@given(headers())
def test_round_trip(header: FrameHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert FrameHeader.unpack(packed) == header
    assert FrameHeader.unpack(memoryview(bytearray(packed))) == header


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_bytes_are_a_bounded_header_or_a_protocol_error(data: bytes) -> None:
    check_hostile(data)


@given(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255))
def test_one_changed_byte_is_a_bounded_header_or_a_protocol_error(at: int, value: int) -> None:
    check_hostile(altered(at, value))


def check_hostile(data: bytes) -> None:
    try:
        header = FrameHeader.unpack(data)
    except RemoteProtocolError:
        return
    assert header.payload_bytes <= payload_cap(header.type)
    assert header.chunk < header.num_chunks
    if header.shape:
        assert math.prod(header.shape) * header.dtype.itemsize <= header.payload_bytes


def test_a_version_that_is_not_spoken_is_told_from_a_bad_header() -> None:
    with pytest.raises(UnsupportedError):
        FrameHeader.unpack(altered(0, 2))


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES + 1, 10 * HEADER_BYTES])
def test_a_header_of_another_length(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"got {size}"):
        FrameHeader.unpack(bytes(size))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 0, "frame version 0"),
        (0, 2, "frame version 2"),
        (1, 0, "unknown type"),
        (1, 200, "unknown type"),
        (2, 0x80, "flags or padding"),
    ],
)
def test_bad_leading_bytes(offset: int, value: int, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        FrameHeader.unpack(altered(offset, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chunks": 0, "chunk": 0}, "chunk 0 of 0"),
        ({"num_chunks": 2, "chunk": 2}, "chunk 2 of 2"),
        ({"shape": (2**32 - 1,) * 4}, "longer than the payload"),
        ({"shape": (8, 64)}, "longer than the payload"),
    ],
)
def test_inconsistent_headers(change: dict[str, object], message: str) -> None:
    data = dataclasses.replace(STEP, **change).pack()
    with pytest.raises(RemoteProtocolError, match=message):
        FrameHeader.unpack(data)


@pytest.mark.parametrize("kind", list(FrameType))
def test_a_payload_over_the_cap_is_refused_on_both_sides(kind: FrameType) -> None:
    cap = payload_cap(kind)
    assert cap == (MAX_STEP_BYTES if kind is FrameType.STEP else MAX_CONTROL_BYTES)
    assert FrameHeader.unpack(FrameHeader(kind, payload_bytes=cap).pack()).payload_bytes == cap
    with pytest.raises(LocalProtocolError, match="over the cap"):
        FrameHeader(kind, payload_bytes=cap + 1).pack()
    data = bytearray(FrameHeader(kind).pack())
    data[-4:] = struct.pack(">I", cap + 1)
    with pytest.raises(RemoteProtocolError, match="over the cap"):
        FrameHeader.unpack(data)


@pytest.mark.parametrize(
    "change",
    [
        {"edge": 65536},
        {"epoch": -1},
        {"sequence": 2**64},
        {"shape": (1,) * 5},
        {"session": b"short"},
        {"session": bytes(17)},
    ],
)
def test_what_does_not_fit_is_our_own_error(change: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        FrameHeader(FrameType.STEP, **change).pack()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(WireDtype.NONE, 0), (WireDtype.FLOAT32, 4), (WireDtype.FLOAT16, 2), (WireDtype.BFLOAT16, 2)],
)
def test_element_sizes(dtype: WireDtype, size: int) -> None:
    assert dtype.itemsize == size
