"""Preemption: which sessions give up pages when none are free, and what is recomputed afterwards.

Sessions come in the order in which they were opened: the oldest is served first, the newest gives
up its pages first (first come, first served with recomputation, as in vLLM). Sessions that take
their owner above its share of the pages come after all others, so an owner within its share loses
no page to one above it. Sessions that have had no step for a while come last; otherwise two servers
could each hold pages that a session on the other waits for. A session takes pages only from
sessions behind it. Each session alone fits into the cache, so the first one always makes progress.

Only as many pages are taken as are needed, from the ends of the rows: what is left of a session
stays valid. Rows that shared pages share them again afterwards. A session begins a prompt or a
recomputation only when there is room for all of it and for one more page per row in front of it;
otherwise it would be started again and again.

Decisions on numbers only; owned by the scheduler.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.kv_row import Sequence
from planetserve.scheduler.page_allocator import PageAllocator
from planetserve.scheduler.state import Draft, Lost, Progress, Session
from planetserve.wire.step import RowSlice


@dataclass(frozen=True, slots=True)
class Shortage:
    """There may be too few pages for all ready sessions.

    Attributes:
        order: every session, the first to be served first.
        waiting: ready sessions that have to wait.
    """

    order: tuple[bytes, ...]
    waiting: frozenset[bytes]


class Preemption:
    """Takes pages from sessions of one scheduler and plans how they come back.

    Args:
        allocator: the scheduler's pages.
        page_size: tokens per page.
        max_owner_pages: the share of one owner.
        state_pages: pages that the states of one row take. With states, a session that gives up
            pages gives up all: what is left would be of no use without a state after it.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        max_owner_pages: int,
        state_pages: int = 0,
    ):
        self._allocator = allocator
        self._page_size = page_size
        self._max_owner_pages = max_owner_pages
        self._state_pages = state_pages
        self.num_preemptions = 0
        """How often a session that had all its pages lost some."""
        self.num_rewound_tokens = 0
        """Tokens of unfinished steps that must run again."""

    def shortage(
        self,
        sessions: Mapping[bytes, Session],
        ready: Mapping[bytes, Session],
        idle: Collection[bytes] = (),
    ) -> Shortage | None:
        """Which ready sessions must wait; None if there are pages for everything.

        `idle` are sessions that have had nothing to run for a while.
        """
        needs = {
            session_id: self._pages_to_finish(session) for session_id, session in ready.items()
        }
        reserve = sum(len(session.rows) for session in sessions.values())
        free = self._allocator.num_free
        if sum(needs.values()) + reserve <= free:
            return None
        order = self._order(sessions, idle)
        behind = sum(session.num_pages for session in sessions.values())
        waiting = []
        reserve = 0
        for session_id in order:
            session = sessions[session_id]
            num_pages = session.num_pages
            behind -= num_pages
            if session_id in ready:
                is_new = not session.is_decoding and not session.head.started
                need = needs[session_id]
                if need + (reserve if is_new else 0) > free + behind:
                    waiting.append(session_id)
                else:
                    free -= need
            reserve += len(session.rows) if num_pages else 0
        return Shortage(order, frozenset(waiting))

    def make_room(
        self,
        session_id: bytes,
        num_tokens: int,
        sessions: Mapping[bytes, Session],
        order: tuple[bytes, ...],
        draft: Draft,
    ) -> bool:
        """Take pages from sessions behind this one until its next `num_tokens` tokens fit.

        Returns False if all of them would not be enough; then no pages are taken.
        """
        need = self._pages_needed(sessions[session_id], num_tokens)
        if need <= self._allocator.num_free:
            return True
        behind = order[order.index(session_id) + 1 :]
        held = sum(sessions[other].num_pages for other in behind)
        if need > self._allocator.num_free + held:
            return False
        for other in reversed(behind):
            missing = need - self._allocator.num_free
            if missing <= 0:
                break
            if sessions[other].num_pages:
                self._cut(sessions[other], missing, draft)
                draft.cut.add(other)
        return True

    def plan(self, session_id: bytes, session: Session) -> None:
        """Decide what a session that has lost tokens must recompute before its next step."""
        lost, step = session.lost, session.queue[0]
        if lost is None or session.restoring is not None:
            return
        targets = list(lost.lengths)
        if step.item.reorder is None:
            for chunk in step.item.rows:  # what the step overwrites is not needed
                end = chunk.start if not step.started else targets[chunk.row]
                targets[chunk.row] = min(targets[chunk.row], end)
        slices = []
        lost.pending.clear()
        for row, sequence in enumerate(session.rows):
            start, end = sequence.length, targets[row]
            source, shared = lost.forks[row]
            shared = min(shared, targets[source], end)
            if shared > start:
                lost.pending[row] = (source, shared)
                start = shared
            if start < end:
                slices.append(RowSlice(row, start, end - start))
        if not slices:
            self.finish(session)
            return
        item = StepRequest(step.item.item_id, session_id, tuple(slices))
        session.restoring = Progress(item, step.arrival, item.num_tokens, False, is_restored=True)

    def run_again(self, session: Session, rows: list[Sequence]) -> None:
        """Have a session compute what `rows` of it hold after their last states once more."""
        lengths = [row.length for row in session.rows]
        session.lost = Lost(lengths, [(row, 0) for row in range(len(lengths))])
        for row in rows:
            row.truncate(row.length - row.num_again)

    def finish(self, session: Session) -> None:
        """All lost tokens of the session have been recomputed."""
        self.fork(session, len(session.rows))
        session.lost = session.restoring = None

    def is_fork_due(self, session: Session, row: int) -> bool:
        """Whether this row or an earlier one still has to become a fork."""
        return session.lost is not None and any(other <= row for other in session.lost.pending)

    def fork(self, session: Session, last_row: int) -> None:
        """Let rows up to `last_row` share the pages of earlier rows again, where they shared them
        before."""
        lost = session.lost
        if lost is None:
            return
        for row in [row for row in sorted(lost.pending) if row <= last_row]:
            source, shared = lost.pending.pop(row)
            sequence = session.rows[row]
            sequence.release()
            twin = session.rows[source].fork(sequence.sequence_id)
            twin.truncate(shared)
            session.rows[row] = twin

    def _order(
        self, sessions: Mapping[bytes, Session], idle: Collection[bytes]
    ) -> tuple[bytes, ...]:
        within: list[bytes] = []
        beyond: list[bytes] = []
        last: list[bytes] = []
        owned: dict[str, int] = {}
        # Dictionaries keep the order in which sessions were opened. The order uses what a session
        # will need, not what it holds; otherwise a session would be in front again as soon as it
        # has lost pages.
        for session_id, session in sessions.items():
            pages = sum(map(self._pages_of, session.planned_lengths))
            owned[session.owner] = owned.get(session.owner, 0) + pages
            is_within = owned[session.owner] <= self._max_owner_pages
            (last if session_id in idle else within if is_within else beyond).append(session_id)
        return (*within, *beyond, *last)

    def _cut(self, session: Session, num_pages: int, draft: Draft) -> None:
        """Take at least `num_pages` pages, or all, from the ends of the rows."""
        rows, size = session.rows, self._page_size
        lost = session.lost
        if lost is None:
            self.num_preemptions += 1
            shared = _shared(rows, size)
            if self._state_pages:
                shared = [(row, 0) for row in range(len(rows))]
            lost = Lost([row.length for row in rows], shared)
        session.lost, session.restoring = lost, None
        if self._state_pages:
            draft.cut_sequences += [row.sequence_id for row in rows]
            for row in rows:
                row.truncate(0)
        target = self._allocator.num_free + num_pages
        while self._allocator.num_free < target:
            longest = max(row.length for row in rows)
            if not longest:
                break
            # At the same place in all rows, because pages that they share lie there.
            end = (longest - 1) // size * size
            for row in rows:
                row.truncate(min(end, row.length))
        self._rewind(session, lost, draft)
        if all(row.length == length for row, length in zip(rows, lost.lengths, strict=True)):
            session.lost = None

    def _rewind(self, session: Session, lost: Lost, draft: Draft) -> None:
        """Mark for recomputation what the current step has computed in lost tokens and after
        them."""
        step = session.queue[0] if session.queue else None
        if step is None or not step.num_done:
            return
        done = 0
        for index, chunk in enumerate(step.item.rows[: step.row + 1]):
            ran = step.row_tokens if index == step.row else chunk.num_tokens
            kept = max(0, min(ran, session.rows[chunk.row].length - chunk.start))
            if kept < ran:
                break
            done += ran
        else:
            return
        for later in step.item.rows[index : step.row + 1]:
            row = session.rows[later.row]
            end = later.start + (kept if later is chunk else 0)
            row.truncate(min(row.length, end))
            lost.lengths[later.row] = end
        step.row, step.row_tokens = index, kept
        self.num_rewound_tokens += step.num_done - done - kept
        step.num_left = step.item.num_tokens - done - kept
        draft.rewound.append((step.item.item_id, done + kept))

    def _pages_to_finish(self, session: Session) -> int:
        """Most pages that the session takes until its oldest step is done."""
        step = session.queue[0]
        left = step.left()
        need = self._pages_for(session, left)
        if session.restoring is not None:
            need += self._pages_for(session, session.restoring.left())
        before = 0
        lengths = [row.length for row in session.rows]
        if session.lost is not None:
            lengths = session.lost.lengths
            before = sum(map(self._pages_of, lengths))
        if step.item.reorder is not None and not step.started:
            lengths = [lengths[source] for source in step.item.reorder]
        ends = {row: end for row, _, end in left}
        after = sum(self._pages_of(ends.get(row, length)) for row, length in enumerate(lengths))
        return min(need, max(0, before - session.num_pages, after - session.num_pages))

    def _pages_needed(self, session: Session, num_tokens: int) -> int:
        """Most pages that the next `num_tokens` tokens take."""
        slices = []
        for row, start, end in session.head.left():
            count = min(num_tokens, end - start)
            if count:
                slices.append((row, start, start + count))
            num_tokens -= count
        return min(self._pages_for(session, slices), self._pages_to_finish(session))

    def _pages_for(self, session: Session, slices: list[tuple[int, int, int]]) -> int:
        may_copy = len(session.rows) > 1
        need = sum(
            self._pages_of(end) - self._pages_of(start)
            + (may_copy and start % self._page_size != 0)
            for _, start, end in slices
        )  # fmt: skip
        if may_copy and self._state_pages:  # a fork may have none of its own yet
            need += sum(self._state_pages for _, start, _ in slices if start)
        return need

    def _pages_of(self, length: int) -> int:
        return -(-length // self._page_size) + (self._state_pages if length else 0)


def _shared(rows: list[Sequence], page_size: int) -> list[tuple[int, int]]:
    """For each row, the earliest row before it with which it shares the most tokens, and their
    number.

    Rows share pages only by forking, so rows with a common page also share all pages before it. So
    it is enough to find the last common page of a row.
    """
    # Per page the rows that hold it and fill it further than those before them, at most one for
    # each of its slots: (row, tokens up to the end of the page).
    holders: dict[int, list[tuple[int, int]]] = {}
    found = []
    for row, sequence in enumerate(rows):
        pages, length = sequence.pages, sequence.length
        best = (row, 0)
        index = len(pages)
        while index:
            index -= 1
            end = min(length, (index + 1) * page_size)
            known = holders.get(pages[index])
            if known is None:
                holders[pages[index]] = [(row, end)]
                continue
            best = next((holder for holder in known if holder[1] >= end), known[-1])
            if end > known[-1][1]:
                known.append((row, end))
            break
        found.append((best[0], min(best[1], length)))
    return found
