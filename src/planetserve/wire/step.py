"""The payload of a STEP frame: which tokens of which rows, and their hidden states.

A session has `num_rows` rows, one per sequence of its batch or beam. A step names, for some rows,
where their new tokens start and how many there are; the hidden states of all of them follow,
row after row, as one `[num_tokens, hidden]` tensor. A row whose start lies before the end of its KV
cache is truncated first (rollback). `reorder` (beam search) is applied before that: row `i`
continues what row `reorder[i]` held.

Layout, big-endian: u8 flags (1 = positions follow, 2 = reorder follows, 4 = loads follow) | u8 0 |
u16 number of row slices | per slice u16 row, u32 start, u32 number of tokens | [u16 number of rows,
u16 each: reorder] | [i32 per token: rotary positions] | [loads] | zero bytes up to a multiple of 8
| raw tensor bytes. Positions are absent when each token's position is its place in the KV cache.

On its way a step collects what each hop says of its load: u16 number | per hop u16 edge, u32 time
per block. The answer to the client has no table, but begins with them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from planetserve.errors import LocalProtocolError, RemoteProtocolError
from planetserve.wire.frame import HEADER_BYTES, MAX_EDGE, MAX_STEP_BYTES

MAX_CHUNKS_IN_FLIGHT = 8
"""Chunks of steps that a client has sent and that are not answered, at most. As many as a hop takes
in (docs/protocol.md, 12), so that a first hop whose next one is lost still reads what its client
says of it."""
MAX_ROWS = 1024
MAX_POSITION = 1 << 24

_PREFIX = struct.Struct(">BBH")
_SLICE = struct.Struct(">HII")
_COUNT = struct.Struct(">H")
_LOAD = struct.Struct(">HI")
_POSITION_BYTES = 4
_HAS_POSITIONS = 1
_HAS_REORDER = 2
_HAS_LOADS = 4
MAX_LOADS = MAX_EDGE + 1
_ALIGNMENT = 8
_TABLE_ROOM_BYTES = 64 * 1024
"""What a frame's table may take besides its positions: rows, reorder and loads."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """New tokens `[start, start + num_tokens)` of one row."""

    row: int
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class HopLoad:
    """What a hop says of its load: it is the one that `edge` enters."""

    edge: int
    us_per_block: int
    """Time of a decode step in one block, in microseconds; 0 if it does not know."""

    @classmethod
    def of(cls, edge: int, ms_per_block: float) -> HopLoad:
        """The load in the unit and range of the wire; what is known is never sent as 0."""
        if ms_per_block <= 0:
            return cls(edge, 0)
        return cls(edge, max(1, min(round(1000 * ms_per_block), 2**32 - 1)))


@dataclass(frozen=True, slots=True)
class StepTable:
    """A step without its hidden states. `positions` has one entry per token, or is None.

    `loads` are those of the hops that the step has passed, in order.
    """

    rows: tuple[RowSlice, ...]
    positions: tuple[int, ...] | None = None
    reorder: tuple[int, ...] | None = None
    loads: tuple[HopLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.rows)

    @property
    def is_decode(self) -> bool:
        """Whether every row named gets one token."""
        return all(piece.num_tokens == 1 for piece in self.rows)

    def with_loads(self, loads: tuple[HopLoad, ...]) -> StepTable:
        """The same step with these loads."""
        return StepTable(self.rows, self.positions, self.reorder, loads)

    def last_tokens(self) -> list[int]:
        """Index, among the step's tokens, of the last token of each row slice."""
        indices, total = [], 0
        for piece in self.rows:
            total += piece.num_tokens
            indices.append(total - 1)
        return indices

    def split(self, max_tokens: int) -> tuple[StepTable, ...]:
        """Cut into consecutive tables of at most `max_tokens` tokens; the first keeps `reorder`."""
        if self.num_tokens <= max_tokens:
            return (self,)
        pieces: list[list[RowSlice]] = [[]]
        room = max_tokens
        for piece in self.rows:
            start = piece.start
            while start < piece.end:
                if not room:
                    pieces.append([])
                    room = max_tokens
                taken = min(room, piece.end - start)
                pieces[-1].append(RowSlice(piece.row, start, taken))
                start += taken
                room -= taken
        tables, offset = [], 0
        for index, rows in enumerate(pieces):
            count = sum(piece.num_tokens for piece in rows)
            positions = self.positions and self.positions[offset : offset + count]
            tables.append(StepTable(tuple(rows), positions, None if index else self.reorder))
            offset += count
        return tuple(tables)

    @staticmethod
    def merge(tables: Sequence[StepTable]) -> StepTable:
        """The inverse of `split`."""
        rows: list[RowSlice] = []
        for table in tables:
            for piece in table.rows:
                if rows and rows[-1].row == piece.row and rows[-1].end == piece.start:
                    last = rows.pop()
                    piece = RowSlice(last.row, last.start, last.num_tokens + piece.num_tokens)
                rows.append(piece)
        positions = None
        if all(table.positions is not None for table in tables):
            positions = tuple(p for table in tables for p in table.positions or ())
        return StepTable(tuple(rows), positions, tables[0].reorder)

    def pack(self) -> bytes:
        """The table's bytes, which the tensor's bytes follow.

        Raises:
            LocalProtocolError: a number does not fit.
        """
        flags = (self.positions is not None) * _HAS_POSITIONS
        flags |= (self.reorder is not None) * _HAS_REORDER
        flags |= bool(self.loads) * _HAS_LOADS
        try:
            parts = [_PREFIX.pack(flags, 0, len(self.rows))]
            parts += [_SLICE.pack(piece.row, piece.start, piece.num_tokens) for piece in self.rows]
            if self.reorder is not None:
                count = len(self.reorder)
                parts.append(struct.pack(f">H{count}H", count, *self.reorder))
            if self.positions is not None:
                parts.append(struct.pack(f">{len(self.positions)}i", *self.positions))
            if self.loads:
                parts.append(_pack_loads(self.loads))
        except struct.error as error:
            raise LocalProtocolError(f"a step field is out of range: {error}") from error
        return _padded(b"".join(parts))

    @classmethod
    def unpack(
        cls, payload: bytes | bytearray | memoryview, num_rows: int, num_tokens: int
    ) -> tuple[StepTable, int]:
        """Parse the table at the start of `payload`.

        Args:
            payload: the whole STEP payload.
            num_rows: rows the session was opened with; every row number must be below it.
            num_tokens: what the frame's header says; the slices must add up to it.

        Returns:
            The table and the offset at which the tensor's bytes start.

        Raises:
            RemoteProtocolError: truncated, row out of range or named twice, too many tokens.
        """
        view = memoryview(payload)
        try:
            flags, zero, count = _PREFIX.unpack_from(view, 0)
            offset = _PREFIX.size
            known = _HAS_POSITIONS | _HAS_REORDER | _HAS_LOADS
            if flags & ~known or zero or count > num_rows:
                raise RemoteProtocolError("bad step: flags or number of rows")
            rows = []
            for _ in range(count):
                rows.append(RowSlice(*_SLICE.unpack_from(view, offset)))
                offset += _SLICE.size
            reorder = None
            if flags & _HAS_REORDER:
                (length,) = struct.unpack_from(">H", view, offset)
                if length != num_rows:
                    raise RemoteProtocolError("bad step: reorder must name every row")
                reorder = struct.unpack_from(f">{length}H", view, offset + 2)
                offset += 2 + 2 * length
            positions = None
            if flags & _HAS_POSITIONS:
                if _POSITION_BYTES * num_tokens > len(view) - offset:
                    raise RemoteProtocolError("bad step: positions are cut short")
                positions = struct.unpack_from(f">{num_tokens}i", view, offset)
                offset += _POSITION_BYTES * num_tokens
            loads: tuple[HopLoad, ...] = ()
            if flags & _HAS_LOADS:
                loads, offset = _unpack_loads(view, offset)
        except struct.error as error:
            raise RemoteProtocolError("bad step: cut short") from error
        table = cls(tuple(rows), positions, reorder, loads)
        _check(table, num_rows, num_tokens)
        return table, offset + -offset % _ALIGNMENT


def max_table_bytes(num_rows: int, num_tokens: int, num_loads: int) -> int:
    """Most bytes that a table may have in front of its tensor, in a session of `num_rows` rows."""
    slices = _PREFIX.size + min(num_rows, num_tokens) * _SLICE.size
    reorder = _COUNT.size * (1 + num_rows)
    loads = _COUNT.size + num_loads * _LOAD.size
    return slices + reorder + _POSITION_BYTES * num_tokens + loads + _ALIGNMENT


def max_frame_tokens(token_bytes: int) -> int:
    """Most tokens in one STEP frame, at least one, whose hidden states take `token_bytes` each."""
    room_bytes = MAX_STEP_BYTES - _TABLE_ROOM_BYTES - HEADER_BYTES
    return max(1, room_bytes // (token_bytes + _POSITION_BYTES))


def pack_answer_head(loads: Sequence[HopLoad]) -> bytes:
    """What an answer to the client begins with; its tensor's bytes follow.

    Raises:
        LocalProtocolError: a number does not fit.
    """
    try:
        return _padded(_pack_loads(loads))
    except struct.error as error:
        raise LocalProtocolError(f"a load is out of range: {error}") from error


def unpack_answer_head(
    payload: bytes | bytearray | memoryview,
) -> tuple[tuple[HopLoad, ...], int]:
    """The loads at the start of an answer, and the offset at which its tensor's bytes start.

    Raises:
        RemoteProtocolError: too many, or cut short.
    """
    try:
        loads, offset = _unpack_loads(memoryview(payload), 0)
    except struct.error as error:
        raise RemoteProtocolError("bad answer: cut short") from error
    return loads, offset + -offset % _ALIGNMENT


def _pack_loads(loads: Sequence[HopLoad]) -> bytes:
    packed = [_LOAD.pack(load.edge, load.us_per_block) for load in loads]
    return _COUNT.pack(len(loads)) + b"".join(packed)


def _unpack_loads(view: memoryview, offset: int) -> tuple[tuple[HopLoad, ...], int]:
    (count,) = _COUNT.unpack_from(view, offset)
    if count > MAX_LOADS:
        raise RemoteProtocolError("bad step: more loads than a ring has hops")
    offset += _COUNT.size
    starts = range(offset, offset + count * _LOAD.size, _LOAD.size)
    return tuple(HopLoad(*_LOAD.unpack_from(view, start)) for start in starts), starts.stop


def _padded(packed: bytes) -> bytes:
    return packed + bytes(-len(packed) % _ALIGNMENT)


def _check(table: StepTable, num_rows: int, num_tokens: int) -> None:
    rows = table.rows
    if not rows:
        raise RemoteProtocolError("bad step: no rows")
    if len(rows) > 1 and len({piece.row for piece in rows}) != len(rows):
        raise RemoteProtocolError("bad step: a row is unknown or named twice")
    total = 0
    for piece in rows:
        count = piece.num_tokens
        if piece.row >= num_rows:
            raise RemoteProtocolError("bad step: a row is unknown or named twice")
        if not 0 < count <= piece.start + count <= MAX_POSITION:
            raise RemoteProtocolError("bad step: an empty row, or one past the largest position")
        total += count
    if total != num_tokens:
        raise RemoteProtocolError("bad step: rows and header disagree on the number of tokens")
    if table.reorder is not None and any(row >= num_rows for row in table.reorder):
        raise RemoteProtocolError("bad step: reorder names an unknown row")
    if table.positions is not None and not all(0 <= p <= MAX_POSITION for p in table.positions):
        raise RemoteProtocolError("bad step: a position is out of range")
