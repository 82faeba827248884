"""One direction of one edge: vectors, tampering with everything, limits, erasure."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import session_vectors as vectors
from hypothesis import given
from hypothesis import strategies as st

from planetserve.crypto.channel import (
    MAX_AGE_S,
    MAX_BYTES,
    MAX_FRAMES,
    MAX_PLAINTEXT_BYTES,
    EdgeOpener,
    EdgeSealer,
)
from planetserve.errors import (
    Blame,
    DecryptionFailed,
    LocalProtocolError,
    RekeyNeeded,
    RemoteProtocolError,
)
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    HEADER_BYTES,
    MAX_STEP_BYTES,
    Direction,
    FrameHeader,
    FrameType,
    WireDtype,
)

SECRET, SESSION, EDGE = vectors.INBOUND, vectors.SESSION, vectors.EDGE
PLAINTEXT = vectors.PLAINTEXT
HEADER = FrameHeader.unpack(bytes.fromhex(vectors.HEADER_HEX))
FIELDS = {field.name for field in dataclasses.fields(FrameHeader) if field.init}
OTHER_VALUES: dict[str, Any] = {
    "type": FrameType.PING,
    "session": bytes(16),
    "edge": 2,
    "direction": Direction.BACKWARD,
    "epoch": 1,
    "sequence": 1,
    "step": 6,
    "position": 8,
    "num_tokens": 3,
    "span_start": 5,
    "span_end": 9,
    "dtype": WireDtype.BFLOAT16,
    "codec": 1,
    "shape": (3, 2),
    "chunk": 1,
    "num_chunks": 2,
    "payload_bytes": 57,
    "flags": 0,
}


def sealer(epoch: int = 0, direction: Direction = Direction.FORWARD) -> EdgeSealer:
    return EdgeSealer(SECRET, SESSION, EDGE, epoch, direction, now_s=0.0)


def opener(epoch: int = 0, direction: Direction = Direction.FORWARD) -> EdgeOpener:
    return EdgeOpener(SECRET, SESSION, EDGE, epoch, direction)


def changed(header: FrameHeader, **changes: Any) -> FrameHeader:
    return dataclasses.replace(header, **changes)


def check_refused(end: EdgeOpener, header: FrameHeader, payload: bytes | bytearray) -> None:
    """`end` refuses the frame, and then the good one that it would have taken."""
    good_header, good = sealer().seal(HEADER, [PLAINTEXT], 0.0)
    with pytest.raises(DecryptionFailed) as caught:
        end.open(header, payload)
    assert str(caught.value) == "a sealed message was refused"
    assert caught.value.blame is Blame.REMOTE
    assert caught.value.__cause__ is None
    assert end.failed
    with pytest.raises(DecryptionFailed):
        end.open(good_header, good)


def test_the_frame_vectors() -> None:
    end, other = sealer(), opener()
    for sequence in range(2):
        header, payload = end.seal(HEADER, [PLAINTEXT[:16], memoryview(PLAINTEXT)[16:]], 0.0)
        assert payload.hex() == vectors.EXPECTED[f"payload {sequence}"]
        assert header == changed(HEADER, sequence=sequence, payload_bytes=len(payload))
        assert other.open(header, bytearray(payload)) == PLAINTEXT


@pytest.mark.parametrize(
    ("name", "epoch", "direction"),
    [
        ("edge, epoch 0, forward", 0, Direction.FORWARD),
        ("edge, epoch 0, backward", 0, Direction.BACKWARD),
        ("edge, epoch 1, forward", 1, Direction.FORWARD),
    ],
)
def test_the_key_vectors(name: str, epoch: int, direction: Direction) -> None:
    header, payload = sealer(epoch, direction).seal(
        changed(HEADER, epoch=epoch, direction=direction), [PLAINTEXT], 0.0
    )
    material = bytes.fromhex(vectors.EXPECTED[name])
    assert payload == vectors.gcm_seal(material, 0, PLAINTEXT, header.pack())


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_pieces_come_back_as_one(parts: list[bytes]) -> None:
    header, payload = sealer().seal(changed(HEADER, dtype=WireDtype.NONE), parts, 0.0)
    assert opener().open(header, payload) == b"".join(parts)


@pytest.mark.parametrize(
    "name", sorted(FIELDS - {"session", "edge", "direction", "epoch", "codec"})
)
def test_sealing_keeps_every_field_but_two(name: str) -> None:
    before = changed(changed(HEADER, num_chunks=4), **{name: OTHER_VALUES[name]})
    header, payload = sealer().seal(before, [PLAINTEXT], 0.0)
    assert header == changed(before, sequence=0, payload_bytes=len(payload))
    assert opener().open(header, payload) == PLAINTEXT


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_header_field_is_authenticated(name: str) -> None:
    header, payload = sealer().seal(changed(HEADER, num_chunks=4), [PLAINTEXT], 0.0)
    check_refused(opener(), changed(header, **{name: OTHER_VALUES[name]}), payload)


def test_every_bit_of_a_packed_header_is_authenticated() -> None:
    header, payload = sealer().seal(HEADER, [PLAINTEXT], 0.0)
    packed = header.pack()
    num_parsed = 0
    for bit in range(8 * HEADER_BYTES):
        altered = bytearray(packed)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            parsed = FrameHeader.unpack(altered)
        except RemoteProtocolError:
            continue
        num_parsed += 1
        with pytest.raises(DecryptionFailed):
            opener().open(parsed, payload)
    assert num_parsed > 300


@given(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255), st.integers(0, 4))
def test_an_accepted_header_has_one_encoding(at: int, value: int, num_dims: int) -> None:
    packed = bytearray(changed(HEADER, shape=(1,) * num_dims).pack())
    packed[at] = value
    try:
        header = FrameHeader.unpack(packed)
    except RemoteProtocolError:
        return
    assert header.pack() == packed


def test_every_byte_of_a_payload_is_authenticated() -> None:
    header, payload = sealer().seal(HEADER, [PLAINTEXT], 0.0)
    for at in range(len(payload)):
        altered = bytearray(payload)
        altered[at] ^= 0x80
        check_refused(opener(), header, altered)


@given(st.data())
def test_a_long_payload_is_authenticated_everywhere(data: st.DataObject) -> None:
    header, payload = sealer().seal(HEADER, [bytes(range(256)) * 300], 0.0)
    altered = bytearray(payload)
    start = data.draw(st.integers(0, len(payload) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=64))[: len(payload) - start]
    altered[start : start + len(noise)] = noise
    if altered != payload:
        check_refused(opener(), header, altered)


@pytest.mark.parametrize("announced", [True, False])
def test_no_other_length_is_accepted(announced: bool) -> None:
    header, payload = sealer().seal(changed(HEADER, dtype=WireDtype.NONE), [PLAINTEXT], 0.0)
    for size in range(len(payload) + 20):
        cut = (payload + bytes(20))[:size]
        if size != len(payload):
            told = changed(header, payload_bytes=size) if announced else header
            check_refused(opener(), told, cut)


@pytest.mark.parametrize(
    "other",
    [
        EdgeOpener(vectors.OUTBOUND, SESSION, EDGE, 0, Direction.FORWARD),
        EdgeOpener(SECRET, bytes(16), EDGE, 0, Direction.FORWARD),
        EdgeOpener(SECRET, SESSION, 2, 0, Direction.FORWARD),
        EdgeOpener(SECRET, SESSION, EDGE, 1, Direction.FORWARD),
        EdgeOpener(SECRET, SESSION, EDGE, 0, Direction.BACKWARD),
    ],
    ids=["secret", "session", "edge", "epoch", "direction"],
)
def test_another_edge_opens_nothing_even_if_the_header_is_made_to_fit(other: EdgeOpener) -> None:
    header, payload = sealer().seal(HEADER, [PLAINTEXT], 0.0)
    session, edge, epoch, direction = other._name
    fitting = changed(header, session=session, edge=edge, epoch=epoch, direction=direction)
    check_refused(other, fitting, payload)


@pytest.mark.parametrize("sequence", [1, 2, 2**63, 2**64 - 1])
def test_a_frame_that_is_not_the_next_is_refused_unread(sequence: int) -> None:
    end = sealer()
    end._sequence = sequence if sequence < MAX_FRAMES else 0
    header, payload = end.seal(HEADER, [PLAINTEXT], 0.0)
    check_refused(opener(), changed(header, sequence=sequence), payload)


def test_a_repeated_frame_is_refused() -> None:
    header, payload = sealer().seal(HEADER, [PLAINTEXT], 0.0)
    end = opener()
    end.open(header, payload)
    check_refused(end, header, payload)


@pytest.mark.parametrize("name", ["session", "edge", "direction", "epoch"])
def test_a_header_of_another_edge_is_our_own_error_and_uses_no_number(name: str) -> None:
    end = sealer()
    with pytest.raises(LocalProtocolError, match="another session, edge, epoch or direction"):
        end.seal(changed(HEADER, **{name: OTHER_VALUES[name]}), [PLAINTEXT], 0.0)
    assert end.seal(HEADER, [PLAINTEXT], 0.0)[0].sequence == 0


def test_the_cap_of_a_step_counts_the_tag() -> None:
    end, other = sealer(), opener()
    plaintext = bytes(MAX_PLAINTEXT_BYTES)
    with pytest.raises(LocalProtocolError, match="over the cap"):
        end.seal(HEADER, [plaintext, b"x"], 0.0)
    header, payload = end.seal(HEADER, [plaintext], 0.0)
    assert (header.sequence, header.payload_bytes) == (0, MAX_STEP_BYTES)
    assert FrameHeader.unpack(header.pack()) == header
    assert other.open(header, payload) == plaintext


@pytest.mark.parametrize("size", [1, 8, 40, 1000, 16384 + 24])
def test_a_tensor_may_start_at_any_multiple_of_eight(size: int) -> None:
    header, payload = sealer().seal(changed(HEADER, dtype=WireDtype.NONE), [bytes(size)], 0.0)
    plaintext = opener().open(header, payload)
    plaintext[0] = 1  # writable
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(plaintext))
    assert address % 8 == 0


def test_a_key_serves_a_bounded_number_of_frames() -> None:
    end = sealer()
    end._sequence = MAX_FRAMES - 1
    assert end.seal(HEADER, [PLAINTEXT], 0.0)[0].sequence == MAX_FRAMES - 1
    with pytest.raises(RekeyNeeded) as caught:
        end.seal(HEADER, [PLAINTEXT], 0.0)
    assert caught.value.blame is Blame.LOCAL
    assert caught.value.retryable


def test_a_key_serves_a_bounded_number_of_bytes() -> None:
    end = sealer()
    end._num_bytes = MAX_BYTES - len(PLAINTEXT)
    end.seal(HEADER, [PLAINTEXT], 0.0)
    with pytest.raises(RekeyNeeded):
        end.seal(changed(HEADER, dtype=WireDtype.NONE), [b"x"], 0.0)


def test_a_key_serves_a_bounded_time() -> None:
    end = EdgeSealer(SECRET, SESSION, EDGE, 0, Direction.FORWARD, now_s=1000.0)
    end.seal(HEADER, [PLAINTEXT], 1000.0 + MAX_AGE_S - 1.0)
    with pytest.raises(RekeyNeeded):
        end.seal(HEADER, [PLAINTEXT], 1000.0 + MAX_AGE_S)


def test_the_limits_keep_the_margin_that_they_are_chosen_for() -> None:
    # draft-irtf-cfrg-aead-limits, 5.1.1: (blocks + frames + 1)^2 / 2^129; 6 blocks of header and
    # at most one partly filled block a frame.
    num_blocks = MAX_BYTES // 16 + 7 * MAX_FRAMES
    assert (num_blocks + MAX_FRAMES + 1) ** 2 < 2 ** (129 - 64)


def test_erased_ends_do_nothing_more() -> None:
    end, other = sealer(), opener()
    header, payload = end.seal(HEADER, [PLAINTEXT], 0.0)
    for item in (end, other):
        item.erase()
        item.erase()
    with pytest.raises(LocalProtocolError, match="keys are gone"):
        end.seal(HEADER, [PLAINTEXT], 0.0)
    with pytest.raises(DecryptionFailed):
        other.open(header, payload)
    assert other.failed


@pytest.mark.parametrize("end", [sealer(), opener()])
def test_no_end_keeps_the_secret_or_the_key_in_python_memory(end: EdgeSealer | EdgeOpener) -> None:
    key = bytes.fromhex(vectors.EXPECTED["edge, epoch 0, forward"])[:32]
    assert all(secret not in repr(vars(end)).encode() for secret in (SECRET, key))
    held = [value for value in vars(end).values() if isinstance(value, bytes | bytearray)]
    assert [len(value) for value in held] == [4]
    assert SECRET.hex() not in repr(end)


@pytest.mark.parametrize(
    "arguments",
    [
        (bytes(31), SESSION, EDGE, 0),
        (SECRET, b"short", EDGE, 0),
        (SECRET, SESSION, 65536, 0),
        (SECRET, SESSION, EDGE, -1),
        (SECRET, SESSION, EDGE, 2**32),
    ],
)
def test_what_names_no_edge_is_our_own_error(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        EdgeSealer(*arguments, Direction.FORWARD, 0.0)
    with pytest.raises(LocalProtocolError):
        EdgeOpener(*arguments, Direction.FORWARD)


def test_the_keep_last_flag_is_authenticated() -> None:
    header, payload = sealer().seal(changed(HEADER, flags=FLAG_KEEP_LAST), [PLAINTEXT], 0.0)
    check_refused(opener(), changed(header, flags=0), payload)
