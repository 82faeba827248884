"""What one end of an edge seals, the other end takes: steps in chunks, answers, and who is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from planetserve.client.ring.ring_step import RingStep
from planetserve.edge.chunk import StepChunk, split_step
from planetserve.edge.receiver import StepReceiver
from planetserve.edge.sender import StepSender
from planetserve.errors import (
    DecryptionFailed,
    LocalProtocolError,
    PlanetServeError,
    RemoteProtocolError,
    StreamClosed,
)
from planetserve.types import BlockSpan
from planetserve.wire.frame import ANSWER_EDGE, FLAG_KEEP_LAST, FrameHeader
from planetserve.wire.step import HopLoad, RowSlice, StepTable

WIDTH = 4
SESSION, EDGE, SPAN = bytes(range(16)), 1, BlockSpan(2, 4)
TABLE = StepTable((RowSlice(0, 3, 4), RowSlice(1, 0, 2)), tuple(range(6)), (1, 0))
HIDDEN_TD = torch.arange(6 * WIDTH, dtype=torch.float32).view(6, WIDTH)

Told = tuple[int, int, int, int, StepTable, bytes]


class Observer:
    """Takes note of the chunks that it is told of."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def __call__(self, chunk: StepChunk, tensor: memoryview) -> None:
        place = (chunk.step, chunk.chunk, chunk.num_chunks, chunk.flags)
        self.told.append((*place, chunk.table, bytes(tensor)))


class Edge:
    """Both ends of one edge, with an observer each."""

    def __init__(self, edge: int = EDGE):
        self.edge = edge
        self.sent, self.received = Observer(), Observer()
        self.sender = StepSender(SESSION, torch.float32, observer=self.sent)
        self.receiver = StepReceiver(
            SESSION, edge, WIDTH, torch.float32, num_rows=2, span=SPAN, observer=self.received
        )
        self.epoch = -1
        self.rekey()

    def rekey(self) -> None:
        self.epoch += 1
        secret = bytearray([self.epoch] * 32)
        span = (0, 0) if self.edge == ANSWER_EDGE else (SPAN.start, SPAN.end)
        self.sender.start(secret, self.edge, self.epoch, span, 0.0)
        self.receiver.start(secret, self.epoch)

    def seal(self, chunk: StepChunk, load: HopLoad | None = None) -> tuple[FrameHeader, bytearray]:
        header, payload = self.sender.seal(chunk, 0.0, load)
        return header, bytearray(payload)

    def pass_on(self, chunk: StepChunk, load: HopLoad | None = None) -> StepChunk | None:
        header, payload = self.seal(chunk, load)
        self.receiver.check(header)
        return self.receiver.open(header, payload)


def step(
    number: int, max_tokens: int = 100, flags: int = 0, table: StepTable = TABLE
) -> list[StepChunk]:
    return split_step(table, HIDDEN_TD[: table.num_tokens], max_tokens, step=number, flags=flags)


def later(start: int) -> StepTable:
    """One token of row 0."""
    return StepTable((RowSlice(0, start, 1),))


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 100])
def test_a_step_arrives_as_it_was_sent(max_tokens: int) -> None:
    edge = Edge()
    loads = (HopLoad(0, 70), HopLoad(1, 80))
    chunks = step(0, max_tokens, FLAG_KEEP_LAST)
    arrived = [edge.pass_on(dataclasses.replace(c, loads=loads[:1]), loads[1]) for c in chunks]
    assert [chunk.hidden_TD.tolist() for chunk in arrived if chunk] == [
        chunk.hidden_TD.tolist() for chunk in chunks
    ]
    for chunk, sent in zip(arrived, chunks, strict=True):
        assert chunk is not None
        assert chunk.loads == loads
        assert chunk.table == sent.table.with_loads(loads)
        assert (chunk.step, chunk.chunk, chunk.num_chunks, chunk.flags) == (
            0, sent.chunk, len(chunks), FLAG_KEEP_LAST,
        )  # fmt: skip
    assert edge.sender.frames_sent == edge.receiver.frames_received == len(chunks)


@pytest.mark.parametrize("max_tokens", [1, 4, 100])
def test_observers_of_both_ends_are_told_the_same(max_tokens: int) -> None:
    edge = Edge()
    chunks = [*step(0, max_tokens), *step(1, 100, FLAG_KEEP_LAST, later(7))]
    for chunk in chunks:
        edge.pass_on(chunk)
    assert edge.sent.told == edge.received.told
    assert edge.sent.told == [
        (c.step, c.chunk, c.num_chunks, c.flags, c.table, c.hidden_TD.numpy().tobytes())
        for c in chunks
    ]


def test_what_is_sent_again_is_observed_once_where_it_was_taken() -> None:
    edge = Edge()
    chunks = step(0, 3)
    assert edge.pass_on(chunks[0])
    edge.rekey()
    edge.receiver.expect_repeats(drops_step=False)
    assert edge.pass_on(chunks[0]) is None
    assert edge.pass_on(chunks[1])
    assert [told[1] for told in edge.received.told] == [0, 1]
    assert [told[1] for told in edge.sent.told] == [0, 0, 1]


def test_a_step_that_was_thrown_away_is_observed_from_its_beginning() -> None:
    edge = Edge()
    chunks = step(0, 3)
    edge.pass_on(chunks[0].with_hidden(-chunks[0].hidden_TD))
    edge.rekey()
    edge.receiver.expect_repeats(drops_step=True)
    assert all(edge.pass_on(chunk) for chunk in chunks)
    _, *again = [told[-1] for told in edge.received.told]
    assert b"".join(again) == HIDDEN_TD.numpy().tobytes()


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("max_tokens", [2, 5, 100])
def test_an_answer_brings_the_tokens_that_were_asked_for(keep_last: bool, max_tokens: int) -> None:
    edge = Edge(ANSWER_EDGE)
    chunks = step(0, max_tokens, FLAG_KEEP_LAST if keep_last else 0)
    due = RingStep(0, chunks, HIDDEN_TD, keep_last)
    for chunk in chunks:
        answer = edge.receiver.open(*edge.seal(chunk, HopLoad(0, 9)), due, "last")
        assert answer is not None
        assert answer.loads == (HopLoad(0, 9),)
        assert (answer.table, len(answer.hidden_TD)) == (
            chunk.table, len(chunk.table.rows) if keep_last else chunk.table.num_tokens,
        )  # fmt: skip
        due.take(answer.hidden_TD)
    assert due.output_TD is not None
    wanted = TABLE.last_tokens() if keep_last else list(range(6))
    assert torch.equal(due.output_TD[wanted], HIDDEN_TD[wanted])
    assert edge.sent.told == edge.received.told
    assert [told[4] for told in edge.sent.told] == [chunk.table for chunk in chunks]


@pytest.mark.parametrize(
    "changes",
    [
        {"span_start": 3},
        {"span_end": 5},
        {"num_tokens": 7},
        {"shape": (6, WIDTH + 1)},
        {"payload_bytes": 8 << 20},
    ],
)
def test_a_frame_is_refused_by_its_header(changes: dict[str, Any]) -> None:
    edge = Edge()
    (chunk,) = step(0)
    header, _ = edge.seal(chunk)
    with pytest.raises(RemoteProtocolError):
        edge.receiver.check(dataclasses.replace(header, **changes))
    edge.receiver.check(header)


def test_a_frame_with_the_loads_of_more_hops_than_there_are_is_refused() -> None:
    loads = tuple(HopLoad(edge, 1) for edge in range(SPAN.start + 1))
    edge = Edge()
    (chunk,) = step(0)
    with pytest.raises(RemoteProtocolError, match="loads"):
        edge.receiver.open(*edge.seal(dataclasses.replace(chunk, loads=loads[:-1]), loads[-1]))


def test_nothing_passes_without_keys() -> None:
    edge = Edge()
    (chunk,) = step(0)
    frame = edge.seal(chunk)
    edge.sender.erase()
    with pytest.raises(LocalProtocolError):
        edge.seal(chunk)
    with pytest.raises(StreamClosed):
        StepSender(SESSION, torch.float32).seal(chunk, 0.0)
    edge.receiver.erase()
    with pytest.raises(RemoteProtocolError):
        edge.receiver.open(*frame)
    assert edge.received.told == []


def test_a_frame_of_earlier_keys_does_not_open() -> None:
    edge = Edge()
    (chunk,) = step(0)
    frame = edge.seal(chunk)
    edge.rekey()
    with pytest.raises(DecryptionFailed):
        edge.receiver.open(*frame)
    assert edge.receiver.frames_received == 0


@pytest.mark.parametrize("is_answer", [False, True])
def test_the_sender_is_named_for_what_it_makes_itself(is_answer: bool) -> None:
    edge = Edge(ANSWER_EDGE if is_answer else EDGE)
    (chunk,) = step(0)
    due = RingStep(0, [chunk], HIDDEN_TD, False) if is_answer else None
    header, payload = edge.seal(chunk)
    payload[-1] ^= 1
    with pytest.raises(PlanetServeError) as caught:
        edge.receiver.open(header, payload, due, "sender")
    assert caught.value.peer_id == "sender"
