"""Step tables: round trips, cutting into chunks, and hostile bytes."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import LocalProtocolError, RemoteProtocolError
from planetserve.wire.frame import MAX_EDGE
from planetserve.wire.step import (
    MAX_LOADS,
    MAX_POSITION,
    MAX_ROWS,
    HopLoad,
    RowSlice,
    StepTable,
    pack_answer_head,
    unpack_answer_head,
)

TABLE = StepTable((RowSlice(0, 5, 2), RowSlice(2, 0, 1)), positions=(4, 5, 0), reorder=(2, 1, 0))

LOADS = st.lists(
    st.builds(HopLoad, st.integers(0, MAX_EDGE), st.integers(0, 2**32 - 1)), max_size=5
).map(tuple)


@st.composite
def tables(draw: st.DrawFn) -> tuple[StepTable, int]:
    """A valid table and the number of rows of its session."""
    num_rows = draw(st.integers(1, 12))
    rows = draw(st.sets(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows))
    slices = tuple(RowSlice(row, draw(st.integers(0, 99)), draw(st.integers(1, 9))) for row in rows)
    count = sum(piece.num_tokens for piece in slices)
    position, row = st.integers(0, MAX_POSITION), st.integers(0, num_rows - 1)
    positions = draw(st.none() | st.lists(position, min_size=count, max_size=count).map(tuple))
    reorder = draw(st.none() | st.lists(row, min_size=num_rows, max_size=num_rows).map(tuple))
    return StepTable(slices, positions, reorder, draw(LOADS)), num_rows


def test_the_layout() -> None:
    expected = (
        "03" "00" "0002" + "0000" "00000005" "00000002" + "0002" "00000000" "00000001"
        + "0003" "0002" "0001" "0000" + "00000004" "00000005" "00000000" + "00000000"
    )  # fmt: skip
    packed = TABLE.pack()
    assert packed.hex() == expected
    assert len(packed) % 8 == 0


@given(tables(), st.binary(max_size=40))
def test_round_trip_in_front_of_any_tensor(case: tuple[StepTable, int], tensor: bytes) -> None:
    table, num_rows = case
    packed = table.pack()
    found, offset = StepTable.unpack(packed + tensor, num_rows, table.num_tokens)
    assert found == table
    assert offset == len(packed)
    assert offset % 8 == 0


@given(tables(), st.integers(1, 20))
def test_splitting_bounds_every_piece_and_loses_nothing(
    case: tuple[StepTable, int], max_tokens: int
) -> None:
    table, _ = case
    pieces = table.split(max_tokens)
    assert all(piece.num_tokens <= max_tokens for piece in pieces)
    assert all(piece.num_tokens == max_tokens for piece in pieces[:-1])
    assert all(piece.reorder is None for piece in pieces[1:])
    # What hops say of themselves is collected anew for each piece.
    assert StepTable.merge(pieces) == dataclasses.replace(table, loads=())


@given(st.binary(max_size=200), st.integers(1, MAX_ROWS), st.integers(0, 2**32 - 1))
def test_any_bytes_are_a_valid_table_or_a_protocol_error(
    data: bytes, num_rows: int, num_tokens: int
) -> None:
    check_hostile(data, num_rows, num_tokens)


@given(tables(), st.data())
def test_a_changed_or_cut_table_is_valid_or_a_protocol_error(
    case: tuple[StepTable, int], data: st.DataObject
) -> None:
    table, num_rows = case
    packed = bytearray(table.pack())
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    check_hostile(packed, num_rows, table.num_tokens)
    check_hostile(packed[: data.draw(st.integers(0, len(packed)))], num_rows, table.num_tokens)


def check_hostile(data: bytes | bytearray, num_rows: int, num_tokens: int) -> None:
    try:
        table, _ = StepTable.unpack(data, num_rows, num_tokens)
    except RemoteProtocolError:
        return
    assert table.num_tokens == num_tokens
    assert len({piece.row for piece in table.rows}) == len(table.rows) <= num_rows
    assert all(piece.row < num_rows and 0 < piece.end <= MAX_POSITION for piece in table.rows)
    assert table.reorder is None or len(table.reorder) == num_rows
    assert table.positions is None or len(table.positions) == num_tokens


@pytest.mark.parametrize(
    ("table", "num_rows", "num_tokens", "message"),
    [
        (StepTable(()), 3, 0, "no rows"),
        (StepTable((RowSlice(3, 0, 1),)), 3, 1, "a row is unknown or named twice"),
        (StepTable((RowSlice(0, 0, 1), RowSlice(0, 1, 1))), 3, 2, "a row is unknown or named"),
        (StepTable((RowSlice(0, 0, 1), RowSlice(1, 1, 1))), 1, 2, "flags or number of rows"),
        (StepTable((RowSlice(0, 0, 0),)), 3, 0, "an empty row"),
        (StepTable((RowSlice(0, MAX_POSITION, 1),)), 3, 1, "past the largest position"),
        (StepTable((RowSlice(0, 0, 2),)), 3, 1, "disagree on the number of tokens"),
        (StepTable((RowSlice(0, 0, 2**32 - 1),)), 3, 2**32 - 1, "past the largest position"),
        (StepTable((RowSlice(0, 0, 1),), reorder=(0, 1)), 3, 1, "reorder must name every row"),
        (StepTable((RowSlice(0, 0, 1),), reorder=(0, 3, 1)), 3, 1, "reorder names an unknown row"),
        (StepTable((RowSlice(0, 0, 1),), positions=(-1,)), 3, 1, "position is out of range"),
        (StepTable((RowSlice(0, 0, 1),), (MAX_POSITION + 1,)), 3, 1, "position is out of range"),
    ],
)
def test_tables_that_do_not_fit_the_session(
    table: StepTable, num_rows: int, num_tokens: int, message: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        StepTable.unpack(table.pack(), num_rows, num_tokens)


def test_a_huge_claim_of_positions_is_refused_before_it_is_read() -> None:
    data = struct.pack(">BBHHII", 1, 0, 1, 0, 0, 2**24)
    with pytest.raises(RemoteProtocolError, match="positions are cut short"):
        StepTable.unpack(data, 1, 2**24)


@pytest.mark.parametrize(
    "table",
    [
        StepTable((RowSlice(70000, 0, 1),)),
        StepTable((RowSlice(0, -1, 1),)),
        StepTable((), positions=(2**31,)),
        StepTable((), reorder=(-1,)),
    ],
)
def test_numbers_that_do_not_fit_are_our_own_error(table: StepTable) -> None:
    with pytest.raises(LocalProtocolError, match="out of range"):
        table.pack()


@given(LOADS, st.binary(max_size=40))
def test_an_answer_begins_with_the_loads(loads: tuple[HopLoad, ...], tensor: bytes) -> None:
    head = pack_answer_head(loads)
    assert unpack_answer_head(head + tensor) == (loads, len(head))
    assert len(head) % 8 == 0


@pytest.mark.parametrize("head", [b"", b"\x00", b"\x00\x01\x00\x00", b"\x04\x01" + bytes(7000)])
def test_bad_loads_are_refused(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_answer_head(head)
    table = StepTable((RowSlice(0, 0, 1),)).pack()
    with pytest.raises(RemoteProtocolError):
        StepTable.unpack(b"\x04" + table[1:14] + head, 1, 1)


def test_a_load_fits_its_field_whatever_was_measured() -> None:
    assert HopLoad.of(1, 2.5).us_per_block == 2500
    assert HopLoad.of(1, 1e12).us_per_block == 2**32 - 1
    assert HopLoad.of(1, 1e-6).us_per_block == 1  # 0 would say that it does not know
    assert HopLoad.of(1, 0.0).us_per_block == 0
    assert HopLoad.of(1, -1.0).us_per_block == 0
    assert MAX_LOADS == MAX_EDGE + 1
    with pytest.raises(LocalProtocolError):
        pack_answer_head([HopLoad(-1, 0)])
