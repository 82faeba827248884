"""The digest of what has crossed one end of an edge, by row and position.

Each end of an edge has one, and both come to the same. It depends on what steps mean: rows, places,
rotary positions and bytes of tokens, and reordered rows. It does not depend on how steps are cut
into chunks, on keys and loads, nor on how often something was sent. It has two parts:

- `rows`: what the rows hold now. A rollback cuts a row, a reorder copies rows. What fills a new
  receiver (FLAG_REPLAY) leaves them as they are.
- `chain`: a hash chain of the steps that have passed since the edge has its present ends, those
  that were rolled back later included.

Where an edge gets another end during a step, parts of that step may have passed between the old
ones, so the chain begins with the step after it.

The hash is BLAKE3: from hidden states of 8 KB on it takes a half to a quarter of the time of
SHA-256, and below that both take microseconds (`benchmarks/verification_cost.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from blake3 import blake3

from planetserve.edge.chunk import StepChunk
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import ANSWER_EDGE, FLAG_KEEP_LAST, FLAG_REPLAY
from planetserve.wire.step import StepTable

DIGEST_BYTES = 32
NO_ROWS = bytes(DIGEST_BYTES)
_EDGE_LABEL = b"planetserve edge 1"
_STEP_LABEL = b"planetserve step 1"
_ROWS_LABEL = b"planetserve rows 1"
_EDGE = struct.Struct(">16sHI")
_STEP = struct.Struct(">IHI")
_TOKEN = struct.Struct(">HII32s")
_PLACE = struct.Struct(">I32s")
_STRETCH = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class EdgeState:
    """What one end of an edge says has crossed it."""

    edge: int
    epoch: int
    next_step: int
    """Number of the first step that is not in the chain."""
    num_tokens: int
    """Tokens in the chain."""
    chain: bytes
    rows: bytes
    """Only at the end of a session; before that `NO_ROWS`."""


@dataclass(slots=True)
class _Row:
    """Tokens of one row, in stretches of consecutive ones: position and digest of each.

    An edge may lack the first tokens of a row, if it has another sender since, and the answer edge
    lacks those that the client did not ask for.
    """

    stretches: list[tuple[int, bytearray]] = field(default_factory=list)

    def copy(self) -> _Row:
        return _Row([(start, bytearray(tokens)) for start, tokens in self.stretches])

    def truncate(self, length: int) -> None:
        while self.stretches:
            start, tokens = self.stretches[-1]
            kept_bytes = (length - start) * _PLACE.size
            if kept_bytes > 0:
                del tokens[kept_bytes:]
                return
            self.stretches.pop()

    def append(self, start: int, tokens: bytes) -> None:
        if self.stretches:
            first, known = self.stretches[-1]
            if first + len(known) // _PLACE.size == start:
                known += tokens
                return
        self.stretches.append((start, bytearray(tokens)))

    def digest(self) -> bytes:
        parts: list[bytes | bytearray] = []
        for start, tokens in self.stretches:
            parts += [_STRETCH.pack(start, len(tokens) // _PLACE.size), tokens]
        return blake3(b"".join(parts)).digest()


class EdgeDigest:
    """An observer of one end of an edge. Call `start` when the edge gets keys.

    Args:
        session_id: of the session.
        num_rows: rows of the session.
        on_step: is called when a step is whole, and in the chain if it belongs there.
    """

    def __init__(self, session_id: bytes, num_rows: int, on_step: Callable[[], None] | None = None):
        self._session_id = session_id
        self._on_step = on_step
        self._edge = 0
        self._epoch = 0
        self._first_step = 0
        self._next_step = 0
        self._num_tokens = 0
        self._chain = b""
        self._rows = [_Row() for _ in range(num_rows)]
        self._step = _Step(-1)

    @property
    def next_step(self) -> int:
        """Number of the first step that is not in the chain."""
        return self._next_step

    def start(self, edge: int, epoch: int, first_step: int) -> None:
        """The edge has new keys, and the end at its other side may be another.

        Args:
            edge: its number.
            epoch: of its keys.
            first_step: the first step that passes between these ends, maybe in part.
        """
        self._edge, self._epoch = edge, epoch
        # In the first epoch, nothing has passed between others before.
        self._first_step = self._next_step = first_step + 1 if epoch else first_step
        self._num_tokens = 0
        self._chain = blake3(_EDGE_LABEL + _EDGE.pack(self._session_id, edge, epoch)).digest()

    def __call__(self, chunk: StepChunk, tensor: memoryview) -> None:
        """A chunk has been sealed or accepted; one that is numbered 0 begins its step anew.

        Raises:
            RemoteProtocolError: an answer for other tokens than were asked for.
        """
        if chunk.chunk == 0:
            self._begin(chunk)
        table = chunk.table
        token_bytes = chunk.hidden_TD.shape[1] * chunk.hidden_TD.itemsize
        digests = [
            blake3(tensor[start : start + token_bytes]).digest()
            for start in range(0, len(tensor), token_bytes)
        ]
        positions = table.positions or [
            index for piece in table.rows for index in range(piece.start, piece.end)
        ]
        if self._edge == ANSWER_EDGE and chunk.flags & FLAG_KEEP_LAST:
            self._add_last(table, positions, digests)
        elif len(digests) != table.num_tokens:
            raise RemoteProtocolError("the chain answered for other tokens than was asked")
        else:
            self._add_all(table, positions, digests)
        if chunk.chunk + 1 == chunk.num_chunks:
            self._end(chunk)

    def state(self, *, with_rows: bool) -> EdgeState:
        """What has crossed the edge so far; a step under way is in the rows alone."""
        rows = NO_ROWS
        if with_rows:
            each = b"".join(row.digest() for row in self._rows)
            rows = blake3(_ROWS_LABEL + each).digest()
        return EdgeState(
            self._edge, self._epoch, self._next_step, self._num_tokens, self._chain, rows
        )

    def _begin(self, chunk: StepChunk) -> None:
        before, reorder = self._step, chunk.table.reorder
        if before.number == chunk.step and before.rows is not None:
            self._rows = before.rows
        self._step = step = _Step(chunk.step, reorder or ())
        if chunk.flags & FLAG_REPLAY:
            self._rows = [_Row() for _ in self._rows]
        if reorder is not None:
            step.rows = self._rows
            self._rows = [self._rows[source].copy() for source in reorder]

    def _add_all(
        self, table: StepTable, positions: Sequence[int], digests: Sequence[bytes]
    ) -> None:
        step, offset = self._step, 0
        for piece in table.rows:
            end = offset + piece.num_tokens
            places, tokens = positions[offset:end], digests[offset:end]
            offset = end
            row = self._rows[piece.row]
            row.truncate(piece.start)
            row.append(piece.start, b"".join(map(_PLACE.pack, places, tokens)))
            indices = range(piece.start, piece.end)
            step.tokens += map(_TOKEN.pack, repeat(piece.row), indices, places, tokens)

    def _add_last(
        self, table: StepTable, positions: Sequence[int], digests: Sequence[bytes]
    ) -> None:
        """Add the last token of each row; `digests` are those, or those of all tokens."""
        lasts, step = table.last_tokens(), self._step
        if len(digests) == table.num_tokens:
            digests = [digests[last] for last in lasts]
        elif len(digests) != len(lasts):
            raise RemoteProtocolError("the chain answered for other tokens than was asked")
        for piece, last, digest in zip(table.rows, lasts, digests, strict=True):
            row, index, place = self._rows[piece.row], piece.end - 1, positions[last]
            # The last token of an earlier chunk is not the row's last one.
            row.truncate(piece.start - 1 if piece.row in step.lasts else piece.start)
            row.append(index, _PLACE.pack(place, digest))
            step.lasts[piece.row] = _TOKEN.pack(piece.row, index, place, digest)

    def _end(self, chunk: StepChunk) -> None:
        step = self._step
        tokens = [*step.tokens, *step.lasts.values()]
        step.tokens, step.lasts = [], {}
        if chunk.flags & FLAG_REPLAY:
            return
        if chunk.step >= self._first_step:
            head = _STEP.pack(chunk.step, len(step.reorder), len(tokens))
            order = struct.pack(f">{len(step.reorder)}H", *step.reorder)
            digest = blake3(b"".join([_STEP_LABEL, head, order, *tokens])).digest()
            self._chain = blake3(self._chain + digest).digest()
            self._num_tokens += len(tokens)
            self._next_step = chunk.step + 1
        if self._on_step is not None:
            self._on_step()


@dataclass(slots=True)
class _Step:
    """The step that has begun last, and what its digest is made of."""

    number: int
    reorder: tuple[int, ...] = ()
    rows: list[_Row] | None = None
    """The rows before it, if it has reordered them: it may be sent again."""
    tokens: list[bytes] = field(default_factory=list)
    lasts: dict[int, bytes] = field(default_factory=dict)
    """The last token of each row, where only these are asked for."""
