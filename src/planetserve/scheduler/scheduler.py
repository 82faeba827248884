"""Iteration-level scheduling (ORCA): which tokens of which sessions run in the next forward pass.

Every call of `schedule` makes one batch: first decode steps of all ready sessions, then chunks of
longer steps, up to a token budget. A long step is spread over several batches, so that it never
stalls the others. `commit` reports the batch done. Only one batch is open at a time.

Steps of one session run in the order they were added, at most one per batch. A step that starts
before the end of a row's tokens cuts the row first (rollback); one that starts after it is refused.

A scheduler that preempts may admit more sessions than its pages can hold. When they run out,
`preemption.py` decides which sessions wait and which give up pages; what was lost is recomputed
before the session's next step.

Owned by the engine thread; does no locking, no input or output, and knows no time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from planetserve.errors import ConfigError, SessionError
from planetserve.scheduler.batch import ScheduledBatch, ScheduledChunk, StepRequest
from planetserve.scheduler.kv_row import Sequence, StateBudget
from planetserve.scheduler.page_allocator import PageAllocator
from planetserve.scheduler.policies import POLICIES, Candidate, Grant
from planetserve.scheduler.preemption import Preemption
from planetserve.scheduler.state import Draft, Progress, Session
from planetserve.scheduler.token_budget import PREFILL_SHARE, TokenBudget


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How a scheduler divides the work.

    Attributes:
        num_pages: pages of the KV cache.
        page_size: tokens per page.
        max_batch_tokens: token budget of one batch.
        max_decode_tokens: a step with at most this many tokens per row counts as a decode step.
        policy: name in `POLICIES`.
        chunkable: whether a row's new tokens may be spread over several batches.
        can_rollback: whether a sequence can be cut anywhere, not only to nothing.
        preempts: whether sessions may lose pages to others when these run out. Needs pages that can
            be taken one by one, and steps that can be spread; each session alone must fit.
        max_owner_share: fraction of the pages that one owner's sessions may hold before they lose
            their place in the order of age.
        states: what a row takes for states of recurrent layers.
    """

    num_pages: int
    page_size: int = 16
    max_batch_tokens: int = 512
    max_decode_tokens: int = 16
    policy: str = "deficit_round_robin"
    chunkable: bool = True
    can_rollback: bool = True
    preempts: bool = False
    max_owner_share: float = 1.0
    states: StateBudget = StateBudget()  # noqa: RUF009 - a constant

    def __post_init__(self) -> None:
        if min(self.num_pages, self.page_size, self.max_decode_tokens) < 1:
            raise ConfigError("num_pages, page_size and max_decode_tokens must be at least 1")
        if self.max_batch_tokens < PREFILL_SHARE:
            raise ConfigError(
                f"max_batch_tokens {self.max_batch_tokens} is too small to share between decode "
                f"and prefill; give at least {PREFILL_SHARE}"
            )
        if self.preempts and not (self.chunkable and self.can_rollback):
            raise ConfigError("sessions that lose pages need a model that takes steps in parts")
        POLICIES.check(self.policy)


class Ready(NamedTuple):
    """Sessions by what they run next: tokens of decode steps, or anything longer."""

    prefilling: set[bytes]
    decoding: dict[bytes, int]


class Scheduler:
    """Sessions, their queued steps and their pages."""

    def __init__(self, config: SchedulerConfig):
        self._config = config
        self._allocator = PageAllocator(config.num_pages)
        max_owner_pages = max(1, int(config.num_pages * config.max_owner_share))
        self._preemption = Preemption(
            self._allocator, config.page_size, max_owner_pages, config.states.pages
        )
        self._sessions: dict[bytes, Session] = {}
        self._ready: dict[bytes, Session] = {}
        self._waiting: Collection[bytes] = ()
        self._token_budget = TokenBudget(config.max_batch_tokens, config.policy)
        self._released: list[int] = []
        self._num_arrivals = 0
        self._num_sequences = 0
        self._num_restored_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._ready)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of unfinished steps that no batch has run yet, or whose results were lost."""
        return sum(
            progress.num_left for session in self._ready.values() for progress in session.queue
        )

    @property
    def waiting(self) -> Collection[bytes]:
        """Sessions that had steps and no pages for them when the last batch was made."""
        return self._waiting

    @property
    def num_preemptions(self) -> int:
        """How often a session lost pages to others."""
        return self._preemption.num_preemptions

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens that ran once more because pages, or states after them, were lost."""
        return self._num_restored_tokens + self._preemption.num_rewound_tokens

    @property
    def num_used_pages(self) -> int:
        return self._allocator.num_used

    @property
    def num_live_tokens(self) -> int:
        """Number of slots in used pages that hold a token; a slot that several rows share counts
        once."""
        size = self._config.page_size
        empty = 0
        # Only the last page of a row can have empty slots; another row may have filled it further.
        partly: dict[int, list[int]] = {}
        for session in self._sessions.values():
            for row in session.rows:
                filled = row.length % size
                if not filled:
                    continue
                page = row.pages[-1]
                if self._allocator.references(page) == 1:
                    empty += size - filled
                else:
                    partly.setdefault(page, []).append(filled)
        for page, fills in partly.items():
            # A row that holds it and is not here has filled it.
            if len(fills) == self._allocator.references(page):
                empty += size - max(fills)
        return self._allocator.num_used * size - empty

    def ready(self) -> Ready:
        """Sessions that have something to run, without those that wait for pages."""
        ready = Ready(set(), {})
        for session_id, session in self._ready.items():
            if session_id in self._waiting:
                continue
            if session.is_decoding:
                ready.decoding[session_id] = session.head.num_left
            else:
                ready.prefilling.add(session_id)
        return ready

    def open(self, session_id: bytes, num_rows: int, owner: str = "") -> None:
        """Start a session with `num_rows` empty rows.

        `owner` is whose share of the pages it counts for.

        Raises:
            SessionError: the session is open already.
        """
        if session_id in self._sessions:
            raise SessionError("a session with this id is open already; use a new random id")
        rows = [self._new_sequence() for _ in range(num_rows)]
        self._sessions[session_id] = Session(owner, rows, [0] * num_rows)

    def close(self, session_id: bytes) -> tuple[int, ...]:
        """Free a session's pages and drop its queue; an unknown session is ignored.

        Returns:
            Ids of the items that will never finish.
        """
        session = self._sessions.pop(session_id, None)
        if session is None:
            return ()
        self._ready.pop(session_id, None)
        self._release(session.rows)
        return tuple(progress.item.item_id for progress in session.queue)

    def add(self, item: StepRequest) -> None:
        """Queue a step behind the session's earlier ones.

        Raises:
            SessionError: unknown session or row, a gap between the row's end and the step's start,
                or a rollback that this model cannot do. Nothing is queued then.
        """
        session = self._sessions.get(item.session_id)
        if session is None:
            raise SessionError("no session with this id is open here")
        session.planned_lengths = self._lengths_after(item, session.planned_lengths)
        longest = max((chunk.num_tokens for chunk in item.rows), default=0)
        is_decode = longest <= self._config.max_decode_tokens
        session.queue.append(Progress(item, self._num_arrivals, item.num_tokens, is_decode))
        self._num_arrivals += 1
        self._ready[item.session_id] = session

    def schedule(
        self, max_prefill_tokens: int | None = None, idle: Collection[bytes] = ()
    ) -> ScheduledBatch:
        """Choose the next batch and assign its pages.

        Args:
            max_prefill_tokens: most tokens of longer steps in it, where these can be spread over
                several batches; None: as many as the batch holds; 0: none beside decode steps.
            idle: sessions without steps that give up their pages first.

        The batch may have no chunks and still name released sequences. `commit` it, or `close` its
        sessions, before the next call.
        """
        draft = Draft()
        order = self._look_for_shortage(idle)
        grants: Iterable[Grant] = self._grants(max_prefill_tokens)
        if order:
            rank = {session_id: place for place, session_id in enumerate(order)}
            grants = sorted(grants, key=lambda grant: rank[grant.session_id])
        for grant in grants:
            self._run(grant, order, draft)
        released, self._released = (*self._released, *draft.cut_sequences), []
        return ScheduledBatch(
            tuple(draft.chunks),
            tuple(draft.forks),
            released,
            tuple(draft.copies),
            tuple(draft.cleared_pages),
            tuple(draft.decoding),
            draft.num_prefill_tokens,
            tuple(draft.started),
            tuple(draft.rewound),
        )

    def commit(self, batch: ScheduledBatch) -> tuple[int, ...]:
        """Record that `batch` has run.

        Returns:
            Ids of the items that are now finished.
        """
        finished = []
        for session_id in dict.fromkeys(chunk.session_id for chunk in batch.chunks):
            session = self._ready.get(session_id)
            if session is None or session.head.num_left:
                continue
            if session.restoring is not None:
                self._preemption.finish(session)
                continue
            finished.append(session.queue.popleft().item.item_id)
            if not session.queue:
                del self._ready[session_id]
        return tuple(finished)

    def check_integrity(self) -> None:
        """Compare pages with page tables.

        Raises:
            PageAccountingError: a page is leaked or used twice.
        """
        self._allocator.check_integrity(
            table
            for session in self._sessions.values()
            for row in session.rows
            for table in (row.pages, row.state_pages)
        )

    def _look_for_shortage(self, idle: Collection[bytes]) -> tuple[bytes, ...]:
        """All sessions, the first to be served first, if pages may run out; else nothing."""
        if not (self._config.preempts or self._config.states.pages):
            return ()
        for session_id, session in self._ready.items():
            self._preemption.plan(session_id, session)
        if not self._config.preempts:
            return ()
        shortage = self._preemption.shortage(self._sessions, self._ready, idle)
        self._waiting = () if shortage is None else shortage.waiting
        return () if shortage is None else shortage.order

    def _run(self, grant: Grant, order: tuple[bytes, ...], draft: Draft) -> None:
        """Put what was granted into the batch, if there are pages for it."""
        session_id = grant.session_id
        session = self._ready[session_id]
        if session_id in draft.cut:
            return
        self._start(session, draft)
        if session.lost is not None and session.restoring is None:
            return  # what it must run again is planned with the next batch
        if order and not self._preemption.make_room(
            session_id, grant.num_tokens, self._sessions, order, draft
        ):
            return
        if session.is_decoding:
            draft.decoding.append(session_id)
        else:
            draft.num_prefill_tokens += grant.num_tokens
        self._take(session, grant.num_tokens, draft)

    def _grants(self, max_prefill_tokens: int | None) -> list[Grant]:
        decode: list[Candidate] = []
        prefill: list[Candidate] = []
        for session_id, session in self._ready.items():
            if session_id in self._waiting:
                continue
            head = session.head
            min_tokens = 1 if self._config.chunkable else head.num_left
            candidate = Candidate(session_id, head.arrival, head.num_left, min_tokens)
            (decode if head.is_decode else prefill).append(candidate)
        return self._token_budget.share(decode, prefill, max_prefill_tokens)

    def _start(self, session: Session, draft: Draft) -> None:
        """Let the session's next step reorder and cut rows before it runs for the first time."""
        head = session.head
        if head.started:
            return
        head.started = True
        if head.is_restored:
            return
        draft.started.append(head.item.item_id)
        self._reorder(session, head.item, draft)
        for chunk in head.item.rows:
            session.rows[chunk.row].truncate(chunk.start)
        rows = [session.rows[chunk.row] for chunk in head.item.rows]
        if any(row.num_again > self._config.max_decode_tokens for row in rows):
            self._preemption.run_again(session, rows)

    def _take(self, session: Session, num_tokens: int, draft: Draft) -> None:
        """Put the next `num_tokens` tokens of what the session runs next into the batch."""
        progress = session.head
        num_chunks = len(draft.chunks)
        while num_tokens:
            row_slice = progress.item.rows[progress.row]
            if progress.is_restored and self._preemption.is_fork_due(session, row_slice.row):
                if len(draft.chunks) > num_chunks:
                    return  # what it forks from must have run before pages of it are copied
                self._preemption.fork(session, row_slice.row)
            count = min(num_tokens, row_slice.num_tokens - progress.row_tokens)
            start = row_slice.start + progress.row_tokens
            sequence = session.rows[row_slice.row]
            num_again = sequence.num_again
            appended = sequence.append(count)
            if appended.copy is not None:
                draft.copies.append(appended.copy)
            if appended.cleared_page is not None:
                draft.cleared_pages.append(appended.cleared_page)
            draft.chunks.append(
                ScheduledChunk(
                    progress.item.item_id,
                    progress.item.session_id,
                    sequence.sequence_id,
                    start - num_again,
                    count + num_again,
                    progress.num_done,
                    sequence.pages[:],
                    appended.slots,
                    row_slice.row,
                    count if progress.is_restored else num_again,
                    tuple(sequence.states),
                )
            )
            num_tokens -= count
            progress.num_left -= count
            progress.row_tokens += count
            self._num_restored_tokens += count if progress.is_restored else num_again
            if progress.row_tokens == row_slice.num_tokens:
                progress.row, progress.row_tokens = progress.row + 1, 0

    def _reorder(self, session: Session, item: StepRequest, draft: Draft) -> None:
        """Rows that keep their place, or are the first to take another's, need no fork."""
        if item.reorder is None:
            return
        old = session.rows
        owners = {source: row for row, source in reversed(list(enumerate(item.reorder)))}
        owners |= {row: row for row, source in enumerate(item.reorder) if row == source}
        rows = []
        for row, source in enumerate(item.reorder):
            if owners[source] == row:
                rows.append(old[source])
                continue
            twin = old[source].fork(self._num_sequences)
            self._num_sequences += 1
            draft.forks.append((twin.sequence_id, old[source].sequence_id))
            rows.append(twin)
        session.rows = rows
        self._release([sequence for row, sequence in enumerate(old) if row not in owners])

    def _lengths_after(self, item: StepRequest, lengths: list[int]) -> list[int]:
        """Row lengths once `item` has run on rows of these `lengths`."""
        num_rows = len(lengths)
        if not item.rows or len({chunk.row for chunk in item.rows}) != len(item.rows):
            raise SessionError("a step must bring tokens, and name each of its rows once")
        if item.reorder is not None:
            if len(item.reorder) != num_rows or not all(0 <= r < num_rows for r in item.reorder):
                raise SessionError(f"reorder must name {num_rows} rows of this session")
            lengths = [lengths[source] for source in item.reorder]
        else:
            lengths = lengths[:]
        for chunk in item.rows:
            if not 0 <= chunk.row < num_rows or chunk.num_tokens < 1:
                raise SessionError(
                    f"{chunk.num_tokens} tokens for row {chunk.row} of a session with "
                    f"{num_rows} rows"
                )
            if not 0 <= chunk.start <= lengths[chunk.row]:
                raise SessionError(
                    f"the step starts at position {chunk.start}, row {chunk.row} holds "
                    f"{lengths[chunk.row]} tokens; send the tokens in between first"
                )
            if 0 < chunk.start < lengths[chunk.row] and not self._config.can_rollback:
                raise SessionError(
                    f"this model cannot roll back to position {chunk.start}; "
                    "start again from position 0"
                )
            lengths[chunk.row] = chunk.end
        return lengths

    def _new_sequence(self) -> Sequence:
        config = self._config
        sequence = Sequence(self._num_sequences, self._allocator, config.page_size, config.states)
        self._num_sequences += 1
        return sequence

    def _release(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.release()
            self._released.append(sequence.sequence_id)
