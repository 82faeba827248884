"""Digests of an edge: the same however steps travel, another when anything in them is another."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planetserve.edge.chunk import StepChunk, split_step
from planetserve.errors import RemoteProtocolError
from planetserve.history import History
from planetserve.verification.digest import EdgeDigest, EdgeState
from planetserve.wire.frame import ANSWER_EDGE, FLAG_KEEP_LAST, FLAG_REPLAY
from planetserve.wire.step import RowSlice, StepTable

WIDTH = 3
SESSION = bytes(range(16))
EDGE = 5


@dataclasses.dataclass(frozen=True)
class Step:
    table: StepTable
    hidden_TD: torch.Tensor
    flags: int = 0

    def chunks(self, number: int, max_tokens: int = 1000) -> list[StepChunk]:
        return split_step(self.table, self.hidden_TD, max_tokens, step=number, flags=self.flags)


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, list[Step]]:
    """Rows and steps of a session, with rollbacks, reordered rows and answers of last tokens."""
    num_rows = draw(st.integers(1, 3))
    lengths = [0] * num_rows
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        reorder = None
        if any(lengths) and draw(st.booleans()):
            reorder = tuple(draw(st.integers(0, num_rows - 1)) for _ in range(num_rows))
            lengths = [lengths[row] for row in reorder]
        named = draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True))
        rows = []
        for row in named:
            start = draw(st.integers(max(0, lengths[row] - 2), lengths[row]))
            rows.append(RowSlice(row, start, draw(st.integers(1, 4))))
            lengths[row] = rows[-1].end
        count = sum(piece.num_tokens for piece in rows)
        positions = tuple(range(7, 7 + count)) if draw(st.booleans()) else None
        hidden_TD = torch.tensor(
            [[draw(st.integers(-99, 99)) for _ in range(WIDTH)] for _ in range(count)],
            dtype=torch.float32,
        )
        flags = FLAG_KEEP_LAST if draw(st.booleans()) else 0
        steps.append(Step(StepTable(tuple(rows), positions, reorder), hidden_TD, flags))
    return num_rows, steps


def bytes_of(hidden_TD: torch.Tensor) -> memoryview:
    return memoryview(hidden_TD.contiguous().numpy()).cast("B")


def put(digest: EdgeDigest, chunks: Iterable[StepChunk], edge: int = EDGE) -> None:
    """What an end of the edge tells its observer."""
    for chunk in chunks:
        hidden_TD = chunk.hidden_TD
        if edge == ANSWER_EDGE and chunk.flags & FLAG_KEEP_LAST:
            hidden_TD = hidden_TD[chunk.table.last_tokens()]
        digest(chunk, bytes_of(hidden_TD))


def digest_of(
    num_rows: int, steps: Iterable[Step], max_tokens: int = 1000, edge: int = EDGE
) -> EdgeState:
    digest = EdgeDigest(SESSION, num_rows)
    digest.start(edge, 0, 0)
    for number, step in enumerate(steps):
        put(digest, step.chunks(number, max_tokens), edge)
    return digest.state(with_rows=True)


def filled(history: History, num_rows: int, number: int, max_tokens: int) -> EdgeDigest:
    """The digest of a receiver that comes in before step `number`, once it has been filled."""
    digest = EdgeDigest(SESSION, num_rows)
    digest.start(EDGE, 1, number)
    put(digest, replayed(history, number, max_tokens))
    return digest


def replayed(history: History, number: int, max_tokens: int) -> list[StepChunk]:
    replay = history.replay()
    if replay is None:
        return []
    return split_step(*replay, max_tokens, step=max(0, number - 1), flags=FLAG_REPLAY)


def settled(num_rows: int, steps: Iterable[Step]) -> History:
    history = History(num_rows)
    for step in steps:
        history.append(step.table, step.hidden_TD)
    return history


@given(texts(), st.integers(1, 5), st.sampled_from([EDGE, ANSWER_EDGE]))
def test_chunks_do_not_matter(text: tuple[int, list[Step]], max_tokens: int, edge: int) -> None:
    num_rows, steps = text
    whole = digest_of(num_rows, steps, edge=edge)
    assert whole.next_step == len(steps)
    assert digest_of(num_rows, steps, max_tokens, edge) == whole


@given(texts(), st.data())
def test_a_new_receiver_comes_to_the_digest_of_its_sender(
    text: tuple[int, list[Step]], data: st.DataObject
) -> None:
    """The sender has had another receiver, which has taken a part of the step under way."""
    num_rows, steps = text
    number = data.draw(st.integers(0, len(steps) - 1))
    cut, recut = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    sender = EdgeDigest(SESSION, num_rows)
    sender.start(EDGE, 0, 0)
    for index, step in enumerate(steps[:number]):
        put(sender, step.chunks(index, cut))
    chunks = steps[number].chunks(number, cut)
    put(sender, chunks[: data.draw(st.integers(0, len(chunks)))])
    history = settled(num_rows, steps[:number])
    sender.start(EDGE, 1, number)
    put(sender, replayed(history, number, recut))
    receiver = filled(history, num_rows, number, recut)
    put(sender, chunks)
    put(receiver, chunks)
    for index, step in enumerate(steps[number + 1 :], number + 1):
        put(sender, step.chunks(index, cut))
        put(receiver, step.chunks(index, cut))
    assert receiver.state(with_rows=True) == sender.state(with_rows=True)
    assert sender.state(with_rows=True).rows == digest_of(num_rows, steps).rows


@given(texts(), st.data())
def test_a_new_sender_comes_to_the_chain_of_its_receiver(
    text: tuple[int, list[Step]], data: st.DataObject
) -> None:
    """The receiver drops what it has of the step under way."""
    num_rows, steps = text
    number = data.draw(st.integers(0, len(steps) - 1))
    receiver = EdgeDigest(SESSION, num_rows)
    receiver.start(EDGE, 0, 0)
    for index, step in enumerate(steps[:number]):
        put(receiver, step.chunks(index))
    chunks = steps[number].chunks(number, data.draw(st.integers(1, 4)))
    taken = data.draw(st.integers(0, len(chunks)))
    put(receiver, chunks[:taken])
    receiver.start(EDGE, 1, number)
    sender = EdgeDigest(SESSION, num_rows)
    sender.start(EDGE, 1, number)
    put(sender, chunks)
    put(receiver, chunks[taken:])
    assert receiver.state(with_rows=True).rows == digest_of(num_rows, steps[: number + 1]).rows
    for index, step in enumerate(steps[number + 1 :], number + 1):
        put(sender, step.chunks(index))
        put(receiver, step.chunks(index))
    assert receiver.state(with_rows=False) == sender.state(with_rows=False)


@given(texts(), st.data())
def test_rows_are_what_a_session_that_began_with_them_has(
    text: tuple[int, list[Step]], data: st.DataObject
) -> None:
    num_rows, steps = text
    history = settled(num_rows, steps)
    assert filled(history, num_rows, len(steps), 3).state(with_rows=True).rows == (
        digest_of(num_rows, steps).rows
    )
    fork = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=3))
    branches = Step(StepTable((RowSlice(0, 0, 1),), None, tuple(fork[:1] * num_rows)), HIDDEN_TD)
    copied = digest_of(num_rows, [*steps, branches])
    same = settled(num_rows, [*steps, branches])
    assert filled(same, num_rows, 9, 3).state(with_rows=True).rows == copied.rows


HIDDEN_TD = torch.ones(1, WIDTH)


def changed(step: Step, kind: str, rng: random.Random, num_rows: int) -> Step:
    table, hidden_TD, rows = step.table, step.hidden_TD.clone(), list(step.table.rows)
    index = rng.randrange(len(rows))
    piece = rows[index]
    if kind == "byte":
        flat = hidden_TD.view(torch.uint8).view(-1)
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
    elif kind == "tokens exchanged" and len(hidden_TD) > 1:
        hidden_TD = hidden_TD.roll(1, 0)
        hidden_TD[0] += 1000
    elif kind == "row":
        rows[index] = dataclasses.replace(piece, row=num_rows - 1 - piece.row)
    elif kind == "place":
        rows[index] = dataclasses.replace(piece, start=piece.start + 1)
    elif kind == "position":
        known = list(table.positions or [
            place for piece in rows for place in range(piece.start, piece.end)
        ])  # fmt: skip
        known[rng.randrange(len(known))] += 1
        table = dataclasses.replace(table, positions=tuple(known))
    elif kind == "reorder":
        table = dataclasses.replace(table, reorder=tuple(reversed(range(num_rows))))
    return Step(dataclasses.replace(table, rows=tuple(rows)), hidden_TD, step.flags)


KINDS = ["byte", "tokens exchanged", "row", "place", "position", "reorder"]


@pytest.mark.parametrize("kind", KINDS)
@given(texts(), st.randoms(use_true_random=False))
def test_any_change_shows(kind: str, text: tuple[int, list[Step]], rng: random.Random) -> None:
    num_rows, steps = text
    index = rng.randrange(len(steps))
    other = changed(steps[index], kind, rng, num_rows)
    named = [piece.row for piece in other.table.rows]
    if len(set(named)) < len(named) or (
        other.table == steps[index].table and torch.equal(other.hidden_TD, steps[index].hidden_TD)
    ):
        return
    before = digest_of(num_rows, steps)
    after = digest_of(num_rows, [*steps[:index], other, *steps[index + 1 :]])
    assert after.chain != before.chain
    # What nothing was rolled back of, or copied over, shows in the rows too.
    if index == len(steps) - 1 and kind != "reorder":
        assert after.rows != before.rows


def test_a_token_that_was_rolled_back_stays_in_the_chain() -> None:
    def steps(value: float) -> list[Step]:
        tables = (StepTable((RowSlice(0, 0, 1),)), StepTable((RowSlice(0, 0, 1),)))
        return [Step(tables[0], HIDDEN_TD * value), Step(tables[1], HIDDEN_TD)]

    kept, other = digest_of(1, steps(1.0)), digest_of(1, steps(2.0))
    assert kept.rows == other.rows
    assert kept.chain != other.chain


def test_edges_and_epochs_have_chains_of_their_own() -> None:
    def chain(edge: int, epoch: int, session: bytes = SESSION) -> bytes:
        digest = EdgeDigest(session, 1)
        digest.start(edge, epoch, 0)
        return digest.state(with_rows=False).chain

    assert len({chain(1, 0), chain(2, 0), chain(1, 1), chain(1, 0, bytes(16))}) == 4


@pytest.mark.parametrize("flags", [0, FLAG_KEEP_LAST])
def test_answers_for_other_tokens_are_refused(flags: int) -> None:
    digest = EdgeDigest(SESSION, 1)
    digest.start(ANSWER_EDGE, 0, 0)
    hidden_TD = torch.ones(4, WIDTH)
    (chunk,) = Step(StepTable((RowSlice(0, 0, 4),)), hidden_TD, flags).chunks(0)
    with pytest.raises(RemoteProtocolError, match="other tokens"):
        digest(chunk, bytes_of(hidden_TD[:2]))


def test_an_answer_of_all_tokens_serves_for_the_last() -> None:
    (chunk,) = Step(StepTable((RowSlice(0, 0, 4),)), torch.ones(4, WIDTH), FLAG_KEEP_LAST).chunks(0)
    states = []
    for hidden_TD in (chunk.hidden_TD, chunk.hidden_TD[-1:]):
        digest = EdgeDigest(SESSION, 1)
        digest.start(ANSWER_EDGE, 0, 0)
        digest(chunk, bytes_of(hidden_TD))
        states.append(digest.state(with_rows=True))
    assert states[0] == states[1]
