"""When pages run out: who waits, who gives up pages, and what is computed again."""

from __future__ import annotations

import random

import pytest

from planetserve.errors import ConfigError
from planetserve.scheduler import preemption
from planetserve.scheduler.batch import ScheduledBatch, StepRequest
from planetserve.scheduler.kv_row import Sequence
from planetserve.scheduler.page_allocator import PageAllocator
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.wire.step import RowSlice

SIZE = 4


def make(num_pages: int, **options) -> Scheduler:
    settings = {
        "max_batch_tokens": 256,
        "max_decode_tokens": SIZE,
        "max_owner_share": 1.0,
        **options,
    }
    return Scheduler(SchedulerConfig(num_pages, SIZE, preempts=True, **settings))


class Serving:
    """Sessions of one scheduler, stepped by name."""

    def __init__(self, num_pages: int, **options):
        self.scheduler = make(num_pages, **options)
        self.finished: list[tuple[str, int]] = []
        self.names: dict[int, tuple[str, int]] = {}

    def open(self, name: str, num_rows: int = 1, owner: str = "", filled: int = 0) -> None:
        """A session, with tokens that have come as decode steps do."""
        self.scheduler.open(name.encode(), num_rows, owner)
        for start in range(0, filled, SIZE):
            self.add(name, (0, start, SIZE))
            self.run()

    def add(self, name: str, *rows: tuple[int, int, int], reorder=None) -> None:
        item_id = len(self.names)
        self.names[item_id] = (name, rows[0][1])
        slices = tuple(RowSlice(*row) for row in rows)
        self.scheduler.add(StepRequest(item_id, name.encode(), slices, reorder))

    def tick(self, idle=()) -> ScheduledBatch:
        batch = self.scheduler.schedule(idle=idle)
        self.scheduler.check_integrity()
        self.finished += [self.names[item_id] for item_id in self.scheduler.commit(batch)]
        return batch

    def run(self) -> list[ScheduledBatch]:
        batches = []
        while self.scheduler.has_work:
            batches.append(self.tick())
            if not batches[-1].chunks:
                break
        return batches

    @property
    def waiting(self) -> set[str]:
        return {session_id.decode() for session_id in self.scheduler.waiting}


def old_and_new() -> Serving:
    """Two sessions that fill the cache, three pages and one; the newer one needs another."""
    serving = Serving(4)
    serving.open("old", filled=12)
    serving.open("new", filled=4)
    serving.add("new", (0, 4, 1))
    return serving


def restored(batches: list[ScheduledBatch]) -> list[tuple[str, int, int]]:
    return [
        (chunk.session_id.decode(), chunk.start, chunk.end)
        for batch in batches
        for chunk in batch.chunks
        if chunk.num_restored
    ]


def test_the_newest_gives_up_what_the_oldest_needs_and_no_more():
    serving = Serving(9)
    for name in ("old", "mid", "new"):
        serving.open(name, filled=12)
    serving.add("old", (0, 12, 1))
    serving.run()
    assert serving.finished[-1] == ("old", 12)
    assert serving.scheduler.num_preemptions == 1
    # Only the last page of the newest one is gone, and only that is computed again.
    serving.add("new", (0, 12, 1))
    serving.run()
    assert serving.waiting == {"new"}
    serving.scheduler.close(b"mid")
    batches = serving.run()
    assert restored(batches) == [("new", 8, 12)]
    assert serving.finished[-1] == ("new", 12)
    assert serving.scheduler.num_recomputed_tokens == 4


def test_nobody_takes_pages_from_an_older_session():
    serving = old_and_new()
    assert not serving.tick().chunks
    assert serving.waiting == {"new"}
    assert serving.scheduler.num_preemptions == 0
    serving.scheduler.close(b"old")
    serving.run()
    assert serving.finished[-1] == ("new", 4)


def test_a_session_without_steps_loses_pages_to_newer_ones():
    serving = old_and_new()
    assert serving.tick(idle={b"old"}).chunks
    assert serving.finished[-1] == ("new", 4)
    serving.scheduler.close(b"new")
    serving.add("old", (0, 12, 1))
    assert restored(serving.run()) == [("old", 8, 12)]


def test_an_owner_beyond_his_share_loses_first_however_old_his_sessions_are():
    serving = Serving(8, max_owner_share=0.5)
    for name in ("greedy 1", "greedy 2"):
        serving.open(name, owner="greedy", filled=12)
    serving.open("modest", owner="modest", filled=8)
    serving.add("modest", (0, 8, 1))
    serving.add("greedy 2", (0, 12, 1))
    serving.run()
    assert serving.finished[-1] == ("modest", 8)
    assert serving.waiting == {"greedy 2"}
    # Within the share age counts: the first one of the greedy loses nothing to a newer session.
    serving.add("modest", (0, 9, 12))
    serving.run()
    serving.add("greedy 1", (0, 12, 1))
    serving.run()
    assert serving.finished[-1] == ("greedy 1", 12)


def test_a_prompt_begins_only_when_there_is_room_for_all_of_it():
    serving = Serving(8, max_batch_tokens=8)
    serving.open("old", filled=16)
    serving.open("new")
    serving.add("new", (0, 0, 16))
    # Four pages are free, but the older session may need one soon.
    assert not serving.tick().chunks
    assert serving.waiting == {"new"}
    serving.open("small")
    serving.add("small", (0, 0, 8))
    serving.run()
    assert serving.finished[-1] == ("small", 0)
    serving.scheduler.close(b"old")
    serving.run()
    assert serving.finished[-1] == ("new", 0)
    assert serving.scheduler.num_preemptions == 0


def test_a_prompt_that_is_interrupted_goes_on_where_its_pages_end():
    serving = Serving(8, max_batch_tokens=8)
    serving.open("old", filled=4)
    serving.open("new")
    serving.add("new", (0, 0, 24))
    for _ in range(2):
        serving.tick()
    serving.add("old", (0, 4, 16))
    batches = serving.run()
    assert [rewound for batch in batches for rewound in batch.rewound] == [(1, 12)]
    assert serving.finished[-1] == ("old", 4)
    serving.scheduler.close(b"old")
    batches = serving.run()
    assert restored(batches) == []
    assert batches[0].chunks[0].start == 12
    assert serving.finished[-1] == ("new", 0)
    assert serving.scheduler.num_recomputed_tokens == 4


def test_rows_share_pages_again_after_these_were_taken():
    serving = Serving(20)
    serving.open("old", filled=4)
    serving.open("beams", num_rows=3)
    serving.add("beams", (0, 0, 22))
    serving.run()
    every = ((0, 22, 1), (1, 22, 1), (2, 22, 1))
    serving.add("beams", *every, reorder=(0, 0, 0))
    serving.run()
    before = serving.scheduler.num_used_pages
    assert before == 1 + 5 + 3
    serving.add("old", (0, 4, 74))
    serving.run()
    assert serving.scheduler.num_used_pages == 20
    serving.add("old", (0, 4, 1))
    serving.add("beams", (0, 23, 1), (1, 23, 1), (2, 23, 1), reorder=(2, 1, 0))
    batches = serving.run()
    assert serving.finished[-1] == ("beams", 23)
    assert serving.scheduler.num_used_pages == before + 1
    for batch in batches:
        written = {slot // SIZE for chunk in batch.chunks for slot in chunk.slots}
        # A page is copied before anything is written, so not one that is filled in this batch.
        assert not written & {source for source, _ in batch.copies}
    # The first row anew, and of the others only what was their own.
    assert restored(batches) == [("beams", 0, 23), ("beams", 20, 23), ("beams", 20, 23)]


def test_what_a_step_overwrites_is_not_computed_again():
    serving = Serving(6)
    serving.open("old", filled=8)
    serving.open("new", filled=16)
    serving.add("old", (0, 8, 8))
    serving.run()
    serving.scheduler.close(b"old")
    serving.add("new", (0, 0, 2))
    assert restored(serving.run()) == []
    assert serving.finished[-1] == ("new", 0)


def test_a_session_that_fills_the_cache_gets_all_of_it():
    serving = Serving(6, max_owner_share=0.1)
    for name in ("first", "second"):
        serving.open(name, num_rows=2)
        serving.add(name, (0, 0, 12), (1, 0, 12))
    serving.run()
    assert serving.finished == [("first", 0)]
    serving.add("first", (0, 2, 10), (1, 3, 9), reorder=(1, 0))
    serving.run()
    assert serving.finished[-1] == ("first", 2)
    serving.scheduler.close(b"first")
    serving.run()
    assert serving.finished[-1] == ("second", 0)


def test_models_that_need_whole_steps_cannot_lose_pages():
    with pytest.raises(ConfigError):
        make(4, chunkable=False)


def forked_rows(seed: int) -> list[Sequence]:
    """Rows that were forked, cut and appended to as beams are."""
    chance = random.Random(seed)
    allocator = PageAllocator(4096)
    rows = [Sequence(index, allocator, SIZE) for index in range(12)]
    for _ in range(40):
        index = chance.randrange(len(rows))
        if chance.random() < 0.4:
            rows[index].release()
            rows[index] = chance.choice(rows).fork(index)
        rows[index].truncate(chance.randint(rows[index].length // 2, rows[index].length))
        rows[index].append(chance.randrange(9))
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_shared_rows_are_those_of_a_comparison_of_all_pairs(seed: int):
    rows = forked_rows(seed)
    expected = []
    for index, row in enumerate(rows):
        best = (index, 0)
        for earlier, other in enumerate(rows[:index]):
            common = [a for a, b in zip(row.pages, other.pages, strict=False) if a == b]
            tokens = min(len(common) * SIZE, row.length, other.length)
            if tokens > best[1]:
                best = (earlier, tokens)
        expected.append(best)
    assert preemption._shared(rows, SIZE) == expected


class CountedPages(list):
    """A page table that counts how many of its entries are read."""

    reads = 0

    def __getitem__(self, index):
        CountedPages.reads += 1
        return super().__getitem__(index)

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]


def test_finding_shared_rows_reads_each_page_a_few_times():
    allocator = PageAllocator(4096)
    first = Sequence(0, allocator, SIZE)
    first.append(16 * SIZE)
    rows = [first] + [first.fork(index) for index in range(1, 1024)]
    for row in rows:
        row.pages = CountedPages(row.pages)
    CountedPages.reads = 0
    preemption._shared(rows, SIZE)
    assert CountedPages.reads < 4 * len(rows) + 16 * 4
