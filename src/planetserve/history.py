"""Inputs of blocks, row by row, so that a KV cache can be computed again from them.

The client keeps one of what enters the first hop, every hop one of what it passes on, so that a new
hop at its end can be filled. The engine keeps one of what it was sent, for sessions whose pages are
taken. Tensors are never changed: reordering rows (beam search) copies references, truncating
slices them. No tensor takes more than twice the memory of what is kept of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from planetserve.wire.step import RowSlice, StepTable


@dataclass(slots=True)
class _Row:
    length: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)
    positions: list[tuple[int, ...] | None] = field(default_factory=list)

    def copy(self) -> _Row:
        return _Row(self.length, list(self.hidden), list(self.positions))

    def truncate(self, length: int) -> None:
        while self.length > length:
            extra = self.length - length
            last = self.hidden[-1]
            if extra >= len(last):
                self.hidden.pop()
                self.positions.pop()
                self.length -= len(last)
            else:
                keep = len(last) - extra
                self.hidden[-1] = _without_the_rest(last[:keep])
                kept = self.positions[-1]
                self.positions[-1] = kept and kept[:keep]
                self.length -= extra


class History:
    """The inputs of `num_rows` rows."""

    def __init__(self, num_rows: int):
        self._rows = [_Row() for _ in range(num_rows)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row."""
        return tuple(row.length for row in self._rows)

    def append(self, table: StepTable, hidden_TD: torch.Tensor) -> None:
        """Apply a finished step: reorder, truncate, append."""
        self.start(table)
        self.extend(table, hidden_TD)

    def start(self, table: StepTable) -> None:
        """Reorder and truncate, as a step does before its first token."""
        if table.reorder is not None:
            self._rows = [self._rows[source].copy() for source in table.reorder]
        for piece in table.rows:
            self._rows[piece.row].truncate(piece.start)

    def extend(self, table: StepTable, hidden_TD: torch.Tensor) -> None:
        """Append the tokens of a step that has started."""
        offset = 0
        for piece in table.rows:
            row = self._rows[piece.row]
            own_TD = hidden_TD[offset : offset + piece.num_tokens]
            row.hidden.append(_without_the_rest(own_TD))
            positions = table.positions
            row.positions.append(positions and positions[offset : offset + piece.num_tokens])
            row.length += piece.num_tokens
            offset += piece.num_tokens

    def truncate(self, lengths: Sequence[int]) -> None:
        """Cut every row to at most the given length."""
        for row, length in zip(self._rows, lengths, strict=True):
            row.truncate(length)

    def select(self, rows: Sequence[int]) -> History:
        """Another history, whose row `i` holds what row `rows[i]` of this one does."""
        selected = History(0)
        selected._rows = [self._rows[row].copy() for row in rows]
        return selected

    def read(self, index: int, start: int, end: int) -> tuple[torch.Tensor, list[int]]:
        """Tokens `[start, end)` of row `index`: `[end - start, hidden]`, and their positions."""
        row = self._rows[index]
        hidden: list[torch.Tensor] = []
        positions: list[int] = []
        offset = 0
        for piece, known in zip(row.hidden, row.positions, strict=True):
            low, high = max(start - offset, 0), min(end - offset, len(piece))
            if low < high:
                hidden.append(piece[low:high])
                positions += known[low:high] if known else range(offset + low, offset + high)
            offset += len(piece)
        return torch.cat(hidden), positions

    def replay(self) -> tuple[StepTable, torch.Tensor] | None:
        """One step that fills an empty chain with all rows, or None when there is nothing yet."""
        rows: list[RowSlice] = []
        hidden: list[torch.Tensor] = []
        positions: list[int] = []
        explicit = any(p is not None for row in self._rows for p in row.positions)
        for index, row in enumerate(self._rows):
            if not row.length:
                continue
            rows.append(RowSlice(index, 0, row.length))
            hidden.extend(row.hidden)
            start = 0
            for piece, known in zip(row.hidden, row.positions, strict=True):
                positions.extend(known or range(start, start + len(piece)))
                start += len(piece)
        if not rows:
            return None
        return StepTable(tuple(rows), tuple(positions) if explicit else None), torch.cat(hidden)


def _without_the_rest(part_TD: torch.Tensor) -> torch.Tensor:
    """A small part of a tensor would keep all of its memory."""
    if part_TD.untyped_storage().nbytes() > 2 * part_TD.nbytes:
        return part_TD.clone()
    return part_TD
