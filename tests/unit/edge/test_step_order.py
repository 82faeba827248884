"""Which frames a hop takes in which order: steps one by one, chunks one by one, others refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from planetserve.edge.step_order import StepOrder
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY, FrameHeader, FrameType
from planetserve.wire.step import RowSlice, StepTable


class Hop:
    """A hop that is sent one frame after the other."""

    def __init__(self, first_step: int = 0):
        self.order = StepOrder(first_step)

    def take(
        self, step: int, chunk: int = 0, num_chunks: int = 1, flags: int = 0, **more: Any
    ) -> bool:
        start = more.get("start", 10 * chunk)
        table = StepTable((RowSlice(0, start, 10),), None, more.get("reorder"))
        header = FrameHeader(
            FrameType.STEP, step=step, chunk=chunk, num_chunks=num_chunks, flags=flags
        )
        return self.order.is_new(header, table)

    def refuses(self, *args: Any, **more: Any) -> None:
        with pytest.raises(RemoteProtocolError):
            self.take(*args, **more)


def test_steps_and_their_chunks_follow_one_another() -> None:
    hop = Hop()
    assert hop.take(0)
    for chunk in range(3):
        assert hop.take(1, chunk, 3, FLAG_KEEP_LAST)
    assert hop.take(2, flags=FLAG_KEEP_LAST)
    assert hop.take(3)


@pytest.mark.parametrize("step", [0, 1, 3, 9, 2**32 - 1])
def test_another_step_than_the_next_is_refused(step: int) -> None:
    hop = Hop()
    hop.take(0)
    hop.take(1)
    hop.refuses(step)


@pytest.mark.parametrize("changes", [
    {"step": 2}, {"step": 0}, {"chunk": 0}, {"chunk": 2}, {"num_chunks": 65535}, {"num_chunks": 3},
    {"flags": 0}, {"flags": FLAG_REPLAY}, {"start": 0}, {"start": 9}, {"start": 11},
    {"reorder": (0,)},
])  # fmt: skip
def test_a_chunk_goes_on_with_its_step(changes: dict[str, Any]) -> None:
    right = {"step": 1, "chunk": 1, "num_chunks": 4, "flags": FLAG_KEEP_LAST}
    hop = Hop()
    hop.take(0)
    hop.take(1, 0, 4, FLAG_KEEP_LAST)
    hop.refuses(**{**right, **changes})


def test_a_step_begins_with_its_first_chunk() -> None:
    Hop().refuses(0, 1, 2)


@pytest.mark.parametrize("step", [0, 6, 8, 9])
def test_the_first_step_is_the_one_that_the_client_named(step: int) -> None:
    Hop(first_step=7).refuses(step)
    assert Hop(first_step=7).take(7)


def test_a_replay_comes_before_everything_else() -> None:
    for first_step, number in ((7, 6), (1, 0), (0, 0)):
        hop = Hop(first_step)
        assert hop.take(number, 0, 2, FLAG_REPLAY)
        assert hop.take(number, 1, 2, FLAG_REPLAY)
        hop.refuses(number + 1, flags=FLAG_REPLAY)
        assert hop.take(number + 1)
        hop.refuses(number + 2, flags=FLAG_REPLAY)
    Hop(7).refuses(7, flags=FLAG_REPLAY)
    Hop(7).refuses(6, flags=FLAG_REPLAY | FLAG_KEEP_LAST)


def test_what_is_here_is_sent_again_only_by_another_hop_upstream() -> None:
    hop = Hop()
    hop.take(0)
    hop.take(1, 0, 3)
    hop.take(1, 1, 3)
    hop.refuses(1, 0, 3)
    hop.order.repeat(drops_step=False)
    assert not hop.take(1, 0, 3)
    assert not hop.take(1, 1, 3)
    hop.refuses(0)
    assert hop.take(1, 2, 3)
    hop.refuses(1, 2, 3)
    hop.order.repeat(drops_step=False)
    assert not hop.take(1, 2, 3)
    assert hop.take(2)
    hop.refuses(1, 2, 3)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_step_that_was_dropped_in_part_begins_again(is_first: bool) -> None:
    hop = Hop(first_step=4)
    if not is_first:
        hop.take(4)
    number = 5 - is_first
    hop.take(number, 0, 3)
    hop.order.repeat(drops_step=True)
    hop.refuses(number, 1, 3)
    assert [hop.take(number, chunk, 3) for chunk in range(3)] == [True] * 3
    assert hop.take(number + 1)


def test_one_step_brings_each_token_of_a_row_once() -> None:
    """Otherwise a hop upstream could make a replay buffer grow without end."""
    order, header = StepOrder(0), FrameHeader(FrameType.STEP, num_chunks=65535)
    pieces = [((0, 0, 5), (1, 0, 3)), ((1, 3, 2), (2, 7, 1)), ((2, 8, 1), (0, 5, 1))]
    for chunk, rows in enumerate(pieces):
        table = StepTable(tuple(RowSlice(*row) for row in rows))
        assert order.is_new(dataclasses.replace(header, chunk=chunk), table)
    table = StepTable((RowSlice(1, 0, 5),))
    with pytest.raises(RemoteProtocolError, match="go on"):
        order.is_new(dataclasses.replace(header, chunk=3), table)
