"""Scheduler: batches respect the budget, order and positions; pages return to zero."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planetserve.errors import ConfigError, SessionError
from planetserve.scheduler.batch import ScheduledBatch, StepRequest
from planetserve.scheduler.kv_row import StateBudget
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.wire.step import RowSlice

PAGE_SIZE = 4


def make(**options) -> Scheduler:
    settings = {"num_pages": 64, "page_size": PAGE_SIZE, "max_batch_tokens": 32}
    return Scheduler(SchedulerConfig(**{**settings, **options}))


def step(item_id: int, session: bytes, *rows: tuple[int, int, int], reorder=None) -> StepRequest:
    return StepRequest(item_id, session, tuple(RowSlice(*row) for row in rows), reorder)


def run(scheduler: Scheduler) -> tuple[ScheduledBatch, tuple[int, ...]]:
    batch = scheduler.schedule()
    scheduler.check_integrity()
    return batch, scheduler.commit(batch)


def test_decode_steps_of_all_sessions_share_one_batch():
    scheduler = make()
    for i in range(5):
        scheduler.open(bytes([i]), 1)
        scheduler.add(step(i, bytes([i]), (0, 0, 1)))
    batch, finished = run(scheduler)
    assert batch.num_tokens == 5
    assert finished == (0, 1, 2, 3, 4)
    assert not scheduler.has_work


def test_a_long_prompt_is_spread_over_ticks_and_never_stalls_decoding():
    scheduler = make(max_batch_tokens=16, max_decode_tokens=2)
    scheduler.open(b"long", 1)
    scheduler.open(b"fast", 1)
    scheduler.add(step(0, b"long", (0, 0, 60)))
    done = {}
    position = 0
    for tick in range(20):
        scheduler.add(step(100 + tick, b"fast", (0, position, 1)))
        position += 1
        batch, finished = run(scheduler)
        assert batch.num_tokens <= 16
        assert 100 + tick in finished
        done.update(dict.fromkeys(finished, tick))
        if 0 in done:
            break
    assert done[0] == 3


def test_pieces_of_a_split_item_cover_it_exactly():
    scheduler = make(max_batch_tokens=8)
    scheduler.open(b"s", 2)
    scheduler.add(step(1, b"s", (0, 0, 11), (1, 0, 7)))
    seen = []
    finished = ()
    while scheduler.has_work:
        batch, finished = run(scheduler)
        for chunk in batch.chunks:
            assert len(chunk.slots) == chunk.num_tokens
            seen += [(chunk.sequence_id, chunk.start + i) for i in range(chunk.num_tokens)]
            assert chunk.offset + chunk.num_tokens <= 18
    assert finished == (1,)
    assert seen == [(0, i) for i in range(11)] + [(1, i) for i in range(7)]


def test_a_step_before_the_end_rolls_back():
    scheduler = make()
    scheduler.open(b"s", 1)
    scheduler.add(step(1, b"s", (0, 0, 12)))
    run(scheduler)
    assert scheduler.num_used_pages == 3
    scheduler.add(step(2, b"s", (0, 5, 1)))
    batch, _ = run(scheduler)
    assert batch.chunks[0].start == 5
    assert scheduler.num_used_pages == 2


def test_a_step_after_the_end_is_refused_and_the_session_goes_on():
    scheduler = make()
    scheduler.open(b"s", 1)
    scheduler.add(step(1, b"s", (0, 0, 3)))
    with pytest.raises(SessionError, match="holds 3 tokens"):
        scheduler.add(step(2, b"s", (0, 4, 1)))
    scheduler.add(step(3, b"s", (0, 3, 1)))
    finished = run(scheduler)[1] + run(scheduler)[1]
    assert finished == (1, 3)


@pytest.mark.parametrize(
    ("rows", "reorder"),
    [
        ([], None),
        ([(2, 0, 1)], None),
        ([(0, 0, 0)], None),
        ([(0, 0, 1), (0, 1, 1)], None),
        ([(0, 0, 1)], (0,)),
        ([(0, 0, 1)], (0, 2)),
    ],
)
def test_malformed_steps_are_session_errors(rows, reorder):
    scheduler = make()
    scheduler.open(b"s", 2)
    with pytest.raises(SessionError):
        scheduler.add(step(1, b"s", *rows, reorder=reorder))
    assert not scheduler.has_work


def test_unknown_and_doubly_opened_sessions_are_errors():
    scheduler = make()
    with pytest.raises(SessionError):
        scheduler.add(step(1, b"s", (0, 0, 1)))
    scheduler.open(b"s", 1)
    with pytest.raises(SessionError):
        scheduler.open(b"s", 1)


def test_reorder_forks_the_rows_that_are_used_twice():
    scheduler = make()
    scheduler.open(b"s", 3)
    scheduler.add(step(1, b"s", (0, 0, 5), (1, 0, 5), (2, 0, 5)))
    first, _ = run(scheduler)
    ids = [chunk.sequence_id for chunk in first.chunks]
    scheduler.add(step(2, b"s", (0, 5, 1), (1, 5, 1), (2, 5, 1), reorder=(1, 1, 0)))
    batch, _ = run(scheduler)
    assert batch.released == (ids[2],)
    assert [chunk.sequence_id for chunk in batch.chunks[1:]] == [ids[1], ids[0]]
    assert batch.forks == ((batch.chunks[0].sequence_id, ids[1]),)
    assert len(batch.copies) == 1
    scheduler.close(b"s")
    assert scheduler.num_used_pages == 0


@pytest.mark.parametrize("length", [1000, 1008, 1007])
def test_a_long_row_forked_eight_ways_takes_at_most_eight_pages_more(length):
    scheduler = make(num_pages=80, page_size=16, max_batch_tokens=512)
    scheduler.open(b"s", 8)
    scheduler.add(step(1, b"s", (0, 0, length)))
    while scheduler.has_work:
        run(scheduler)
    before = scheduler.num_used_pages
    assert before == -(-length // 16)
    assert scheduler.num_live_tokens == length
    # Every fork writes a token of its own.
    every = tuple((row, length, 1) for row in range(8))
    scheduler.add(step(2, b"s", *every, reorder=(0,) * 8))
    run(scheduler)
    assert scheduler.num_used_pages - before <= 8
    partly = length % 16
    assert scheduler.num_live_tokens == length - partly + 8 * (partly + 1)


def test_live_tokens_are_those_that_some_row_still_has():
    scheduler = make()
    assert scheduler.num_live_tokens == 0
    scheduler.open(b"s", 2)
    scheduler.add(step(1, b"s", (0, 0, 7)))
    run(scheduler)
    scheduler.add(step(2, b"s", (0, 7, 1), (1, 5, 1), reorder=(0, 0)))
    run(scheduler)
    # Row 0 has 8 tokens in two full pages; row 1 shares the first and has 2 in a copy.
    assert (scheduler.num_used_pages, scheduler.num_live_tokens) == (3, 10)
    scheduler.add(step(3, b"s", (0, 2, 1)))
    run(scheduler)
    # Row 1 still has all of the shared page, of which row 0 has made a copy.
    assert (scheduler.num_used_pages, scheduler.num_live_tokens) == (3, 9)


def test_closing_drops_the_queue_and_reports_it():
    scheduler = make(max_batch_tokens=8)
    scheduler.open(b"s", 1)
    scheduler.add(step(1, b"s", (0, 0, 20)))
    scheduler.add(step(2, b"s", (0, 20, 1)))
    batch = scheduler.schedule()
    assert scheduler.num_queued_tokens == 13
    assert scheduler.close(b"s") == (1, 2)
    assert scheduler.commit(batch) == ()
    assert scheduler.num_queued_tokens == 0
    assert scheduler.num_used_pages == 0
    assert scheduler.schedule().released == (0,)
    assert scheduler.close(b"s") == ()


def test_a_model_that_cannot_be_chunked_gets_whole_steps():
    scheduler = make(max_batch_tokens=8, chunkable=False)
    scheduler.open(b"a", 1)
    scheduler.open(b"b", 1)
    scheduler.add(step(1, b"a", (0, 0, 50)))
    scheduler.add(step(2, b"b", (0, 0, 40)))
    sizes = []
    while scheduler.has_work:
        batch, _ = run(scheduler)
        sizes.append([chunk.num_tokens for chunk in batch.chunks])
    assert sorted(sizes) == [[40], [50]]


def test_a_model_that_cannot_roll_back_can_start_again():
    scheduler = make(can_rollback=False)
    scheduler.open(b"s", 1)
    scheduler.add(step(1, b"s", (0, 0, 5)))
    with pytest.raises(SessionError, match="cannot roll back"):
        scheduler.add(step(2, b"s", (0, 4, 1)))
    scheduler.add(step(3, b"s", (0, 0, 2)))
    run(scheduler)
    assert run(scheduler)[1] == (3,)


def test_prefill_advances_while_decoding_fills_the_budget():
    scheduler = make(max_batch_tokens=8, max_decode_tokens=1)
    scheduler.open(b"p", 1)
    scheduler.add(step(0, b"p", (0, 0, 4)))
    for i in range(1, 20):
        scheduler.open(bytes([i]), 1)
    for tick in range(4):
        for i in range(1, 20):
            scheduler.add(step(100 * i + tick, bytes([i]), (0, tick, 1)))
    finished = [item_id for _ in range(4) for item_id in run(scheduler)[1]]
    assert 0 in finished


def test_config_is_checked():
    with pytest.raises(ConfigError, match="policy"):
        SchedulerConfig(num_pages=4, policy="lottery")
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        SchedulerConfig(num_pages=4, max_batch_tokens=2)
    with pytest.raises(ConfigError, match="num_pages"):
        SchedulerConfig(num_pages=0)


class RandomServing(RuleBasedStateMachine):
    """Sessions come, send steps with rollbacks and reorders, and vanish, in random order.

    A dictionary of slots stands in for the KV tensors: each token is written as its (row history)
    value, and after each batch every chunk must read its whole past through its page table.
    """

    MAX_LENGTH = 24
    NUM_ROWS = 2
    MAX_SESSIONS = 4
    PAGES_PER_SESSION = -(-MAX_LENGTH // PAGE_SIZE) * NUM_ROWS
    OPTIONS: ClassVar = {"num_pages": PAGES_PER_SESSION * MAX_SESSIONS}

    def __init__(self):
        super().__init__()
        self.scheduler = make(max_batch_tokens=8, max_decode_tokens=2, **self.OPTIONS)
        self.sessions: dict[bytes, list[list[int]]] = {}
        self.tokens: dict[int, list[list[int]]] = {}
        self.expected: dict[int, list[list[int]]] = {}
        self.items: dict[int, StepRequest] = {}
        self.inputs: dict[bytes, list[list[int]]] = {}
        self.finished: dict[bytes, list[int]] = {}
        self.slots: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.states: dict[int, dict[int, list[int]]] = {}
        self.next_id = 0

    @precondition(lambda self: len(self.sessions) < self.MAX_SESSIONS)
    @rule()
    def open(self):
        session_id = self.next_id.to_bytes(4)
        self.next_id += 1
        self.scheduler.open(session_id, self.NUM_ROWS, "odd" if self.next_id % 2 else "even")
        self.sessions[session_id] = [[] for _ in range(self.NUM_ROWS)]
        self.inputs[session_id] = [[] for _ in range(self.NUM_ROWS)]
        self.finished[session_id] = []

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def add(self, data):
        session_id = data.draw(st.sampled_from(sorted(self.sessions)))
        rows = self.sessions[session_id]
        reorder = None
        if data.draw(st.booleans()):
            reorder = tuple(
                data.draw(st.integers(0, self.NUM_ROWS - 1)) for _ in range(self.NUM_ROWS)
            )
            rows = [rows[source][:] for source in reorder]
        slices = []
        for row in range(self.NUM_ROWS):
            start = data.draw(st.integers(max(0, len(rows[row]) - 3), len(rows[row])))
            count = min(data.draw(st.integers(0, 14)), self.MAX_LENGTH - start)
            if count:
                slices.append(RowSlice(row, start, count))
                first = self.next_id * 1000 + row * 100
                rows[row] = rows[row][:start] + [first + i for i in range(count)]
        if not slices:
            return
        item = StepRequest(self.next_id, session_id, tuple(slices), reorder)
        self.next_id += 1
        self.scheduler.add(item)
        self.items[item.item_id] = item
        self.sessions[session_id] = rows
        self.expected[item.item_id] = [rows[chunk.row][: chunk.end] for chunk in slices]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data):
        self._close(data)

    def _close(self, data):
        session_id = data.draw(st.sampled_from(sorted(self.sessions)))
        self.scheduler.close(session_id)
        del self.sessions[session_id]

    @rule()
    def tick(self):
        self._tick()

    def _tick(self) -> bool:
        batch = self.scheduler.schedule()
        self._start_and_rewind(batch)
        self._write_and_read(batch)
        self._keep_states(batch)
        num_in_budget = 0
        for chunk in batch.chunks:
            num_new = chunk.num_tokens - chunk.num_restored
            num_in_budget += num_new or chunk.num_restored
            if num_new:
                assert self.done.get(chunk.item_id, 0) == chunk.offset
                self.done[chunk.item_id] = chunk.offset + num_new
        assert num_in_budget <= 8
        for item_id in self.scheduler.commit(batch):
            item = self.items[item_id]
            self.finished[item.session_id].append(item_id)
            for chunk, tokens in zip(item.rows, self.expected[item_id], strict=True):
                self.inputs[item.session_id][chunk.row] = tokens
        return bool(batch.chunks or batch.started)

    def _start_and_rewind(self, batch: ScheduledBatch) -> None:
        for item_id in batch.started:
            item = self.items[item_id]
            rows = self.inputs[item.session_id]
            reorder = item.reorder or range(self.NUM_ROWS)
            rows[:] = [rows[source][:] for source in reorder]
            for chunk in item.rows:
                del rows[chunk.row][chunk.start :]
        for item_id, num_done in batch.rewound:
            assert num_done < self.done[item_id]
            self.done[item_id] = num_done

    def _write_and_read(self, batch: ScheduledBatch) -> None:
        contents = [
            (target, [self.slots.get(source * PAGE_SIZE + i) for i in range(PAGE_SIZE)])
            for source, target in batch.copies
        ]
        for target, content in contents:
            for i, value in enumerate(content):
                self.slots[target * PAGE_SIZE + i] = value
        for page in batch.cleared_pages:
            for i in range(PAGE_SIZE):
                self.slots[page * PAGE_SIZE + i] = -1
        used = set()
        for chunk in batch.chunks:
            expected = self._expected(chunk)
            for i, slot in enumerate(chunk.slots):
                if i >= chunk.num_restored:
                    assert slot not in used
                    used.add(slot)
                self.slots[slot] = expected[chunk.start + i]
        for chunk in batch.chunks:
            read = [
                self.slots[chunk.pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE]
                for i in range(chunk.end)
            ]
            assert read == self._expected(chunk)[: chunk.end]

    def _keep_states(self, batch: ScheduledBatch) -> None:
        """What a runner does with states: each chunk must find the one that it begins with."""
        budget = self.OPTIONS.get("states")
        if budget is None:
            return
        for sequence_id in batch.released:
            self.states.pop(sequence_id, None)
        for new, source in batch.forks:
            self.states[new] = dict(self.states.get(source, {}))
        for chunk in batch.chunks:
            states, text = self.states.setdefault(chunk.sequence_id, {}), self._expected(chunk)
            if chunk.start:
                assert states[chunk.start] == text[: chunk.start]
                assert chunk.start in chunk.kept_states
            states[chunk.end] = text[: chunk.end]
            assert chunk.kept_states[-1] == chunk.end
            assert len(chunk.kept_states) <= 1 + budget.num_kept
            for position in [p for p in states if p not in chunk.kept_states]:
                del states[position]

    def _expected(self, chunk) -> list[int]:
        if chunk.num_restored == chunk.num_tokens:
            return self.inputs[chunk.session_id][chunk.row]
        item = self.items[chunk.item_id]
        before = 0
        for index, row_slice in enumerate(item.rows):
            if chunk.offset < before + row_slice.num_tokens:
                return self.expected[chunk.item_id][index]
            before += row_slice.num_tokens
        raise AssertionError("a chunk outside its item")

    @invariant()
    def pages_are_accounted_for(self):
        self.scheduler.check_integrity()
        rows = [row for session in self.scheduler._sessions.values() for row in session.rows]
        live = {
            row.pages[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
            for row in rows
            for token in range(row.length)
        }
        states = sum(len(row.state_pages) for row in rows)
        assert self.scheduler.num_live_tokens == len(live) + PAGE_SIZE * states

    def teardown(self):
        while self.scheduler.has_work:
            if not self._tick():
                # Somebody who has nothing to run holds the pages; he is not the last.
                self._end_an_idle_session()
        for session_id in self.sessions:
            own = [i for i, item in self.items.items() if item.session_id == session_id]
            assert self.finished[session_id] == own
            self.scheduler.close(session_id)
        self._keep_states(self.scheduler.schedule())
        assert not self.states
        assert self.scheduler.num_used_pages == 0
        assert self.scheduler.num_queued_tokens == 0

    def _end_an_idle_session(self):
        raise AssertionError("every session has the pages that it may need")


class RandomPreemption(RandomServing):
    """The same with too few pages: sessions lose theirs and get them back, and nothing is lost."""

    OPTIONS: ClassVar = {
        "num_pages": RandomServing.PAGES_PER_SESSION + 2,
        "preempts": True,
        "max_owner_share": 0.75,
    }

    @precondition(lambda self: len(self.sessions) == self.MAX_SESSIONS)
    @rule(data=st.data())
    def close(self, data):
        self._close(data)

    @rule(count=st.integers(2, 6))
    def ticks(self, count):
        for _ in range(count):
            self._tick()

    def _end_an_idle_session(self):
        busy = {
            self.items[item_id].session_id for item_id in self.items if not self._is_over(item_id)
        }
        idle = next(session_id for session_id in self.sessions if session_id not in busy)
        self.scheduler.close(idle)
        del self.sessions[idle]

    def _is_over(self, item_id: int) -> bool:
        session_id = self.items[item_id].session_id
        return session_id not in self.sessions or item_id in self.finished[session_id]


STATES = StateBudget(pages=3, num_kept=2)


class RandomStates(RandomServing):
    """The same with layers that keep states."""

    OPTIONS: ClassVar = {"num_pages": RandomServing.OPTIONS["num_pages"] + 24, "states": STATES}


class RandomPreemptionOfStates(RandomPreemption):
    """With states and too few pages."""

    OPTIONS: ClassVar = {
        **RandomPreemption.OPTIONS,
        "num_pages": RandomPreemption.OPTIONS["num_pages"] + 6,
        "states": STATES,
    }


TestRandomServing = RandomServing.TestCase
TestRandomServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomPreemption = RandomPreemption.TestCase
TestRandomPreemption.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestRandomStates = RandomStates.TestCase
TestRandomStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomPreemptionOfStates = RandomPreemptionOfStates.TestCase
TestRandomPreemptionOfStates.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None
)
