"""docs/protocol.md says what the code does: vectors, frame types, header, error codes, limits."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import session_vectors as vectors

from planetserve import errors
from planetserve.crypto import channel, secrets
from planetserve.errors import Blame, PlanetServeError
from planetserve.wire import extensible, frame
from planetserve.wire.frame import FrameType, payload_cap
from planetserve.wire.protocols import PROTOCOL_VERSION

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines()]
FAULTS = {
    Blame.LOCAL: "own", Blame.REMOTE: "peer", Blame.UNKNOWN: "unknown", Blame.NOBODY: "nobody"
}  # fmt: skip
ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PlanetServeError)
]


def test_the_vectors_are_printed() -> None:
    squeezed = "".join(PAGE.split())
    inputs = [vectors.CLIENT_PRIVATE, vectors.HOP_PRIVATE, vectors.HOP_IDENTITY, vectors.PLAINTEXT]
    for value in [*vectors.EXPECTED.values(), vectors.HEADER_HEX, *(item.hex() for item in inputs)]:
        assert value in squeezed
    assert f"{len(vectors.OPEN_PAYLOAD)} bytes\n`{vectors.OPEN_PAYLOAD.decode()}`" in PAGE


def test_the_header_table_is_the_header() -> None:
    start = ROWS.index(["offset", "size", "field", "meaning"]) + 2
    fields = []
    for row in ROWS[start:]:
        if len(row) != 4:
            break
        fields.append((int(row[0]), int(row[1])))
    ends = [offset + size for offset, size in fields]
    assert [offset for offset, _ in fields] == [0, *ends[:-1]]
    assert ends[-1] == frame.HEADER_BYTES
    layout = [struct.calcsize(f">{letter}") for letter in "BBH"] + [frame.SESSION_BYTES]
    assert [size for _, size in fields[:4]] == layout


@pytest.mark.parametrize("kind", list(FrameType))
def test_every_frame_type_is_listed_with_its_cap(kind: FrameType) -> None:
    (row,) = [row for row in ROWS if row[:2] == [str(kind.value), kind.name]]
    cap = payload_cap(kind)
    assert row[3] == (f"{cap >> 20} MiB" if cap >= 1 << 20 else f"{cap >> 10} KiB")


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_code_is_listed_with_its_blame(cls: type[PlanetServeError]) -> None:
    (row,) = [row for row in ROWS if row and f"`{cls.code}`" in row[0].split(", ")]
    assert row[2:] == [FAULTS[cls.blame], "yes" if cls.retryable else "no"]


def test_the_limits_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in ROWS if len(row) == 2}
    assert frame.MAX_STEP_BYTES == 8 << 20
    assert channel.MAX_PLAINTEXT_BYTES == (8 << 20) - 16
    assert limits["payload of a STEP frame, sealed / its plaintext"] == "8 MiB / 8 MiB - 16"
    keys = (channel.MAX_FRAMES, channel.MAX_BYTES, channel.MAX_AGE_S)
    assert keys == (1 << 20, 64 << 30, 3600.0)
    assert limits["frames / plaintext bytes / time per key"] == "2^20 / 64 GiB / 3600 s"
    assert (
        limits["unknown fields of a JSON object / names in `critical` or `capabilities`"]
        == f"{extensible.MAX_UNKNOWN_FIELDS} / {extensible.MAX_NAMES}"
    )
    assert f"at most {extensible.MAX_UNKNOWN_FIELDS} fields that its reader does not know" in PAGE
    assert PAGE.startswith(f"# The session protocol, version {PROTOCOL_VERSION}\n")
    assert f"sealed edge keys, {secrets.EDGE_KEYS_BYTES} bytes" in PAGE
