"""Steps follow one another without gaps, and a hop passes on nothing that does not follow."""

from __future__ import annotations

import pytest

from planetserve.errors import RemoteProtocolError
from planetserve.server.step_order import StepOrder
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY, FrameHeader, FrameType


def frame(step: int, chunk: int = 0, num_chunks: int = 1, flags: int = 0) -> FrameHeader:
    return FrameHeader(FrameType.STEP, step=step, chunk=chunk, num_chunks=num_chunks, flags=flags)


def after(*frames: FrameHeader) -> StepOrder:
    order = StepOrder()
    assert all(order.take(header) for header in frames)
    return order


def test_steps_and_chunks_in_order_are_taken_and_repeated_ones_are_not() -> None:
    frames = [frame(0), *(frame(1, chunk, 3) for chunk in range(3)), frame(2)]
    order = after(*frames)
    assert not any(order.take(header) for header in frames)
    assert order.take(frame(3))


@pytest.mark.parametrize("number", [0, 5, 2**32 - 2])
def test_a_hop_that_joins_later_is_filled_first(number: int) -> None:
    replay = [frame(number, chunk, 2, FLAG_REPLAY) for chunk in range(2)]
    after(*replay, frame(number + 1, flags=FLAG_KEEP_LAST), frame(number + 2))


NOT_NEXT = {
    "a step too many": frame(6),
    "a step far away": frame(14),
    "a later chunk first": frame(5, 1, 2),
    "a replay between steps": frame(5, flags=FLAG_REPLAY),
}


@pytest.mark.parametrize("name", NOT_NEXT)
def test_what_does_not_follow_a_step_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        after(frame(3), frame(4)).take(NOT_NEXT[name])


NOT_NEXT_CHUNK = {
    "a chunk left out": frame(4, 2, 3, FLAG_KEEP_LAST),
    "the next step": frame(5),
    "another number of chunks": frame(4, 1, 2, FLAG_KEEP_LAST),
    "other flags": frame(4, 1, 3),
    "a replay": frame(4, 1, 3, FLAG_REPLAY),
}


@pytest.mark.parametrize("name", NOT_NEXT_CHUNK)
def test_what_does_not_follow_a_chunk_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        after(frame(4, 0, 3, FLAG_KEEP_LAST)).take(NOT_NEXT_CHUNK[name])


def test_a_session_cannot_begin_in_the_middle_of_a_step() -> None:
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        StepOrder().take(frame(0, 1, 2))


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_that_was_held_back_comes_again_from_another_hop(step: int) -> None:
    order = after(*(frame(step, chunk, 3) for chunk in range(2)))
    order.restart_step()
    assert all(order.take(frame(step, chunk, 3)) for chunk in range(3))
    assert order.take(frame(step + 1))
