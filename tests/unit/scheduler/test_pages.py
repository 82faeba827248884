"""Page allocator and sequences: no leak, no double use, copy-on-write keeps every row's content."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planetserve.scheduler.kv_row import Sequence, thin
from planetserve.scheduler.page_allocator import PageAccountingError, PageAllocator

PAGE_SIZE = 4
NUM_PAGES = 24


def test_pages_of_one_sequence_are_consecutive():
    allocator = PageAllocator(32)
    first, second = (Sequence(i, allocator, PAGE_SIZE) for i in range(2))
    first.append(9)
    second.append(3)
    for _ in range(10):
        first.append(1)
        second.append(1)
    for sequence in (first, second):
        pages = list(sequence.pages)
        assert pages == list(range(pages[0], pages[0] + len(pages)))


def test_allocating_beyond_the_pool_is_an_internal_error():
    allocator = PageAllocator(1)
    allocator.allocate()
    with pytest.raises(PageAccountingError):
        allocator.allocate()


def test_double_release_is_noticed():
    allocator = PageAllocator(2)
    page = allocator.allocate()
    allocator.release([page])
    with pytest.raises(PageAccountingError):
        allocator.release([page])
    with pytest.raises(PageAccountingError):
        allocator.share([page])


def test_integrity_check_finds_a_leaked_page():
    allocator = PageAllocator(4)
    allocator.allocate()
    with pytest.raises(PageAccountingError):
        allocator.check_integrity([])


def test_append_to_a_fork_copies_only_the_partly_filled_page():
    allocator = PageAllocator(NUM_PAGES)
    parent = Sequence(0, allocator, PAGE_SIZE)
    parent.append(PAGE_SIZE + 2)
    child = parent.fork(1)
    assert allocator.num_used == 2
    appended = child.append(1)
    assert appended.copy == (parent.pages[1], child.pages[1])
    assert child.pages[0] == parent.pages[0]
    assert parent.append(1).copy is None
    assert allocator.num_used == 3


def test_append_to_a_fork_at_a_page_boundary_copies_nothing():
    allocator = PageAllocator(NUM_PAGES)
    parent = Sequence(0, allocator, PAGE_SIZE)
    parent.append(PAGE_SIZE)
    appended = parent.fork(1).append(2)
    assert appended.copy is None
    assert appended.cleared_page is not None


def test_only_a_new_partly_filled_page_is_cleared():
    sequence = Sequence(0, PageAllocator(NUM_PAGES), PAGE_SIZE)
    assert sequence.append(PAGE_SIZE).cleared_page is None
    assert sequence.append(1).cleared_page == sequence.pages[1]
    assert sequence.append(1).cleared_page is None


class PagedRows(RuleBasedStateMachine):
    """Random edits of rows, with a dictionary of slots standing in for the KV tensors."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.rows: list[tuple[Sequence, list[int]]] = []
        self.slots: dict[int, int] = {}
        self.num_tokens = 0

    def room(self) -> int:
        """Pages that every row together may still take, counted as leases count them."""
        return NUM_PAGES - sum(-(-len(tokens) // PAGE_SIZE) for _, tokens in self.rows)

    @rule()
    def open(self):
        self.rows.append((Sequence(len(self.rows), self.allocator, PAGE_SIZE), []))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append(self, data):
        sequence, tokens = data.draw(st.sampled_from(self.rows))
        slack = -len(tokens) % PAGE_SIZE + self.room() * PAGE_SIZE
        count = data.draw(st.integers(0, min(slack, 11)))
        if not count:
            return
        appended = sequence.append(count)
        if appended.copy is not None:
            source, target = appended.copy
            for offset in range(PAGE_SIZE):
                value = self.slots.get(source * PAGE_SIZE + offset)
                if value is not None:
                    self.slots[target * PAGE_SIZE + offset] = value
        assert len(appended.slots) == count
        for slot in appended.slots:
            self.slots[slot] = self.num_tokens
            tokens.append(self.num_tokens)
            self.num_tokens += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data):
        sequence, tokens = data.draw(st.sampled_from(self.rows))
        length = data.draw(st.integers(0, len(tokens)))
        sequence.truncate(length)
        del tokens[length:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        sequence, tokens = data.draw(st.sampled_from(self.rows))
        if -(-len(tokens) // PAGE_SIZE) <= self.room():
            self.rows.append((sequence.fork(len(self.rows)), tokens[:]))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def close(self, data):
        sequence, _ = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        sequence.release()

    @invariant()
    def every_row_reads_back_its_own_tokens(self):
        for sequence, tokens in self.rows:
            assert sequence.length == len(tokens)
            read = [
                self.slots[sequence.pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE]
                for i in range(len(tokens))
            ]
            assert read == tokens

    @invariant()
    def pages_are_accounted_for(self):
        self.allocator.check_integrity(sequence.pages for sequence, _ in self.rows)

    def teardown(self):
        for sequence, _ in self.rows:
            sequence.release()
        assert self.allocator.num_used == 0


TestPagedRows = PagedRows.TestCase
TestPagedRows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_states_that_stay_are_spread_over_the_past():
    states = [100]
    for end in range(101, 400):
        states.append(end)
        thin(states, 4)
        assert states[-2:] == [end - 1, end]
    assert len(states) == 4
    assert 100 <= states[0] < states[1] < 398 - 10
