"""A replay buffer fills a new hop with what the lost one had, and repeats the step under way."""

from __future__ import annotations

import pytest
import torch

from planetserve.edge.chunk import StepChunk
from planetserve.edge.replay_buffer import ReplayBuffer, ReplayBytes
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import FLAG_REPLAY
from planetserve.wire.step import RowSlice, StepTable


def chunk(
    step: int, *rows: tuple[int, int, int], index: int = 0, reorder: tuple[int, ...] | None = None
) -> StepChunk:
    """A frame whose hidden states say step, row and position."""
    table = StepTable(tuple(RowSlice(*row) for row in rows), None, reorder)
    values = [
        [float(step), float(piece.row), float(position)]
        for piece in table.rows
        for position in range(piece.start, piece.end)
    ]
    return StepChunk(step, index, index + 1, 0, table, torch.tensor(values))


def new_buffer(
    num_rows: int, *, leased: int = 1000, counted: ReplayBytes | None = None
) -> ReplayBuffer:
    return ReplayBuffer(num_rows, "peer", counted or ReplayBytes(), lambda: leased)


def rows_of(replay_buffer: ReplayBuffer) -> dict[int, list[tuple[float, ...]]]:
    chunks = replay_buffer.chunks(0, 1000)
    replayed = [chunk for chunk in chunks if chunk.flags == FLAG_REPLAY]
    if not replayed:
        return {}
    (replay,) = replayed
    hidden_TD = replay.hidden_TD
    rows, start = {}, 0
    for piece in replay.table.rows:
        assert piece.start == 0
        end = start + piece.num_tokens
        rows[piece.row] = [tuple(values) for values in hidden_TD[start:end].tolist()]
        start = end
    return rows


def test_only_the_latest_step_is_kept_as_frames() -> None:
    replay_buffer = new_buffer(2)
    replay_buffer.add(chunk(0, (0, 0, 3), index=0))
    replay_buffer.add(chunk(0, (1, 0, 2), index=1))
    assert [item.chunk for item in replay_buffer.recent()] == [0, 1]
    assert rows_of(replay_buffer) == {}
    replay_buffer.add(chunk(1, (0, 3, 1), (1, 2, 1)))
    assert [item.step for item in replay_buffer.recent()] == [1]
    assert {row: len(values) for row, values in rows_of(replay_buffer).items()} == {0: 3, 1: 2}


def test_a_step_that_is_answered_counts_as_rows() -> None:
    replay_buffer = new_buffer(1)
    replay_buffer.add(chunk(0, (0, 0, 3)))
    replay_buffer.settle(0)
    assert len(replay_buffer.recent()) == 1
    replay_buffer.settle(1)
    assert replay_buffer.recent() == []
    assert rows_of(replay_buffer) == {0: [(0, 0, 0), (0, 0, 1), (0, 0, 2)]}


def test_rollback_and_beams_are_applied() -> None:
    replay_buffer = new_buffer(2)
    replay_buffer.add(chunk(0, (0, 0, 3), (1, 0, 3)))
    replay_buffer.add(chunk(1, (0, 2, 1), (1, 3, 1), reorder=(1, 1)))
    replay_buffer.settle(2)
    assert rows_of(replay_buffer) == {
        0: [(0, 1, 0), (0, 1, 1), (1, 0, 2)],
        1: [(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 1, 3)],
    }


def test_a_row_does_not_keep_the_batch_it_was_computed_in() -> None:
    replay_buffer = new_buffer(1)
    batch_TD = torch.zeros(64, 3)
    one = chunk(0, (0, 0, 1))
    replay_buffer.add(one.with_hidden(batch_TD[5:6]))
    (kept,) = replay_buffer.recent()
    assert kept.hidden_TD.untyped_storage().nbytes() == kept.hidden_TD.nbytes


def test_a_step_of_more_tokens_than_are_leased_is_refused() -> None:
    replay_buffer = new_buffer(1, leased=7)
    replay_buffer.add(chunk(0, (0, 0, 4), index=0))
    with pytest.raises(RemoteProtocolError, match="leased"):
        replay_buffer.add(chunk(0, (0, 0, 4), index=1))
    replay_buffer.add(chunk(1, (0, 4, 3)))


def test_bytes_are_counted_per_peer_and_in_all_and_given_back() -> None:
    counted = ReplayBytes()
    first, second = (new_buffer(1, counted=counted) for _ in range(2))
    other = ReplayBuffer(1, "other", counted, lambda: 1000)
    token_bytes = 3 * 4
    first.add(chunk(0, (0, 0, 5)))
    first.add(chunk(1, (0, 5, 1)))
    second.add(chunk(0, (0, 0, 2)))
    other.add(chunk(0, (0, 0, 3)))
    assert counted.per_peer == {"peer": 8 * token_bytes, "other": 3 * token_bytes}
    first.add(chunk(2, (0, 1, 1)))  # takes back four tokens
    first.add(chunk(3, (0, 2, 1)))
    assert first.num_bytes == 3 * token_bytes
    first.close()
    second.close()
    assert counted.total == 3 * token_bytes
    other.close()
    assert counted.per_peer == {}
