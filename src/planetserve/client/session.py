"""An inference session: rows of KV cache held by a chain, and the history to rebuild them.

Synchronous face of `RingSession`. When hops are lost, the ring is mended with others in their place
and the step goes on. When what the other hops hold cannot be trusted either, or nobody can take the
place, the session opens a ring on another chain, fills it with its history, and sends the step
again. Retries are bounded (`max_retries`); errors that a retry cannot mend are raised at once.
Blocks that the client keeps to itself run here too, around the ring; what is replayed is what went
into the ring.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Sequence
from types import TracebackType

import torch

from planetserve.client.chain_manager import ChainManager
from planetserve.client.conversation import Conversation, HeldText
from planetserve.client.local_blocks import LocalEnds, LocalRows
from planetserve.client.portal import Portal
from planetserve.client.relocation import Relocation
from planetserve.client.reports import Reports
from planetserve.client.ring import RingSession
from planetserve.client.step_checks import check_step, table_by_hand
from planetserve.errors import (
    ConfigError,
    NoChainAvailable,
    PeerReportedError,
    PlanetServeError,
    SessionClosed,
    SessionLengthError,
)
from planetserve.history import History
from planetserve.types import Chain
from planetserve.wire.step import StepTable

logger = logging.getLogger(__name__)


class InferenceSession:
    """Rows of one batch on one chain at a time.

    Args:
        max_length: tokens per row this session may hold; a step past it raises
            `SessionLengthError`. None: as many as the chain's servers allow.
        lease_tokens: tokens per row to lease when the chain is opened (default: `max_length`).
        local: the client's own blocks, if it has some.

    Use as a context manager, or call `close()`. One step at a time; any thread.
    """

    def __init__(
        self,
        manager: ChainManager,
        portal: Portal,
        *,
        max_length: int | None = None,
        lease_tokens: int | None = None,
        local: LocalEnds | None = None,
    ):
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ConfigError(f"max_length={max_length!r} is no number of tokens; give 1 or more")
        self.max_length = max_length
        self.conversation = Conversation()
        """The text that `generate()` continues."""
        self.cache: HeldText | None = None
        """The Hugging Face cache that stands for this session in `generate()`."""
        self.turn = threading.Lock()
        """Held by the `generate()` that is under way."""
        self._lease_tokens = lease_tokens or max_length
        self._manager = manager
        self._portal = portal
        self._local = local
        self._local_rows: LocalRows | None = None
        self._ring: RingSession | None = None
        self._history: History | None = None
        self._seed = secrets.randbits(32)
        self._relocation = Relocation(manager, self._seed)
        self._num_steps = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether the session has been closed."""
        return self._closed

    @property
    def chain(self) -> Chain | None:
        """The chain in use, or None before the first step."""
        return self._ring.chain if self._ring else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per row; empty before the first step."""
        return self._history.lengths if self._history else ()

    @property
    def num_steps(self) -> int:
        """Steps that have gone through so far."""
        return self._num_steps

    @property
    def position(self) -> int:
        """Tokens in the longest row, without the last one that `generate()` has chosen, which no
        block has seen. Setting a smaller number takes as many tokens back from every row."""
        if self.conversation.output_ids is not None:
            return self.conversation.position
        return max(self.lengths, default=0)

    @position.setter
    def position(self, position: int) -> None:
        if not isinstance(position, int) or not 0 <= position <= self.position:
            raise ConfigError(
                f"position {position!r} is not within the {self.position} tokens of the session; "
                "a session can only be rolled back"
            )
        num_taken_back = self.position - position
        if self.conversation.output_ids is not None:
            # The next turn compares the text with what the servers hold.
            self.conversation.take_back(num_taken_back)
        elif self._history is not None:
            # Servers truncate when the next step starts here.
            self._history.truncate([max(0, held - num_taken_back) for held in self.lengths])

    @property
    def output_ids(self) -> torch.Tensor | None:
        """Token ids of the conversation so far `[batch, tokens]`; kept by `generate()`."""
        return self.conversation.output_ids

    @property
    def last_token_id(self) -> torch.Tensor | None:
        """The last token of each row of `output_ids`, `[batch, 1]`."""
        ids = self.conversation.output_ids
        return None if ids is None else ids[:, -1:]

    def step(
        self,
        inputs_BTD: torch.Tensor,
        prompts: None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run `[batch, tokens, hidden]` inputs through all blocks, appending to every row. After
        `generate()` they go on at `position`, and `generate()` goes on no more.

        Args:
            inputs_BTD: hidden states as the embedding makes them; the first call fixes the batch.
            prompts: must be None; it keeps the place that deep prompts have in Petals' signature.
            hypo_ids: row `i` first becomes a copy of row `hypo_ids[i]`.

        Returns:
            The outputs of the last block, same shape and dtype.
        """
        if prompts is not None:
            raise ConfigError("deep prompts are not supported; leave prompts out")
        self._end_conversation()
        table = table_by_hand(inputs_BTD, hypo_ids, self.lengths)
        num_rows, num_tokens, width = inputs_BTD.shape
        output_TD = self.run(num_rows, table, inputs_BTD.detach().cpu().reshape(-1, width))
        return output_TD.reshape(num_rows, num_tokens, width)

    def _end_conversation(self) -> None:
        """Hidden states go on behind the `position` of the text, which then is none of tokens."""
        cache, history = self.cache, self._history
        if cache is None or history is None:
            return
        lengths = self.conversation.rows_in(cache)
        if lengths is None or len(lengths) != len(self.lengths):
            raise ConfigError(
                "servers hold the text of this session in other rows than step() can go on with, "
                "as after a beam search; open another session"
            )
        history.truncate(lengths)
        self.cache, self.conversation = None, Conversation()

    def run(
        self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool = False
    ) -> torch.Tensor:
        """Run one ragged step; see `wire/step.py` for what a table says.

        Raises:
            SessionLengthError: a row would pass `max_length`.
            SessionClosed: the session or its model has been closed.
            PlanetServeError: no chain could run the step within the bounded retries.
        """
        with self._lock:
            self._check_open()
            self._check(num_rows, table, hidden_TD)
            if self._history is None:
                self._history = History(num_rows)
                self._local_rows = None if self._local is None else LocalRows(self._local, num_rows)
            if self._local is None:
                return self._portal.call(self._run(num_rows, table, hidden_TD, keep_last))
            local = self._local_rows
            if local is None:  # closed meanwhile, from another thread
                raise _closed_error()
            return self._run_around(local, num_rows, table, hidden_TD, keep_last=keep_last)

    def expect(self, num_tokens: int) -> None:
        """Lease room for so many tokens per row when servers are next asked for some."""
        if self.max_length is None:
            self._lease_tokens = max(num_tokens, self._lease_tokens or 0)

    def restart(self) -> None:
        """Forget all rows. The next step may bring a batch of another size."""
        with self._lock:
            self._history = self._local_rows = None
            self._portal.post(self._leave())

    def park(self) -> None:
        """Release the servers' memory until the next step, which brings the rows to servers again.
        Does nothing while a step is under way."""
        if self._lock.acquire(blocking=False):
            try:
                self._portal.post(self._leave())
            finally:
                self._lock.release()

    def fork(self, rows: Sequence[int] | None = None) -> InferenceSession:
        """Another session that holds what this one does, or these of its rows. Servers compute
        them once more, at its first step."""
        with self._lock:
            self._check_open()
            fork = InferenceSession(self._manager, self._portal, local=self._local)
            fork.max_length, fork._lease_tokens = self.max_length, self._lease_tokens
            if self._history is not None:
                chosen = range(len(self.lengths)) if rows is None else rows
                fork._history = self._history.select(chosen)
                fork._local_rows = self._local_rows and self._local_rows.select(chosen)
            return fork

    def close(self) -> None:
        """Release the servers' memory. Idempotent; safe from any thread."""
        if not self._closed:
            self._closed = True  # for whoever comes before the portal's loop gets to it
            self._portal.post(self.release())

    async def release(self) -> None:
        """`close()` for callers on the portal's loop; returns when the servers have been told."""
        self._closed = True
        self._local_rows = None
        await self._leave()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()

    def _check(self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor) -> None:
        check_step(num_rows, hidden_TD, len(self.lengths), self._manager.facts.hidden_size)
        longest = max(piece.end for piece in table.rows)
        if self.max_length is not None and longest > self.max_length:
            raise SessionLengthError(
                f"{longest} tokens do not fit the session's max_length={self.max_length}; "
                "open a session with a larger max_length"
            )

    def _run_around(
        self,
        local: LocalRows,
        num_rows: int,
        table: StepTable,
        hidden_TD: torch.Tensor,
        *,
        keep_last: bool,
    ) -> torch.Tensor:
        """A step through the client's first blocks, the ring, and the client's last blocks."""
        entering_TD = local.enter(table, hidden_TD)
        keep_last = keep_last and not local.needs_every_output
        leaving_TD = self._portal.call(self._run(num_rows, table, entering_TD, keep_last))
        try:
            return local.leave(table, leaving_TD)
        except BaseException:
            # The servers have taken the step and the client's last blocks have not.
            self.close()
            raise

    async def _run(
        self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor, keep_last: bool
    ) -> torch.Tensor:
        history = self._history
        if history is None:
            raise _closed_error()
        longest = max(piece.end for piece in table.rows)
        lease_tokens = max(longest, self._lease_tokens or 0)
        self._avoid_leaving(num_rows, lease_tokens)
        loop = asyncio.get_running_loop()
        attempt, reports = 0, Reports()
        while True:
            began_s = loop.time()
            try:
                ring = await self._whole_ring(num_rows, lease_tokens, history)
                if ring.is_waiting:
                    output_TD = await ring.resume()
                else:
                    await self._relocation.move(ring, history)
                    started_s = loop.time()
                    output_TD = await ring.step(table, hidden_TD, keep_last=keep_last)
                    if not attempt:
                        elapsed_s = loop.time() - started_s
                        self._after_step(ring, table, elapsed_s, num_rows, lease_tokens)
                history.append(table, hidden_TD)
                self._num_steps += 1
                return output_TD.to(hidden_TD.dtype)
            except PlanetServeError as error:
                if self._closed:
                    # It may come of that, so no server is to blame; whoever closed the session
                    # has not seen a ring that was just being opened.
                    await self._leave()
                    raise _closed_error() from error
                attempt += 1
                reports.add(error)
                lost_s = loop.time() - began_s
                delay_s = await self._recover(error, attempt, lost_s, num_rows, lease_tokens)
                if delay_s is None:
                    raise reports.final(error, attempt) from error
                await asyncio.sleep(delay_s)
            except asyncio.CancelledError:
                # Ctrl-C in the caller: what the servers hold is unknown, the history is not.
                await self._leave()
                raise

    def _avoid_leaving(self, num_rows: int, lease_tokens: int) -> None:
        """Between two steps: have hops that will leave soon replaced, if others can be found."""
        ring = self._ring
        if ring is None or not ring.leaving:
            return
        if self._manager.can_avoid(ring.leaving, num_rows, lease_tokens):
            logger.info("a server is leaving; another takes its place")
            ring.condemn_leaving()

    async def _whole_ring(self, num_rows: int, lease_tokens: int, history: History) -> RingSession:
        """The session's ring, mended where it was broken, or a new one.

        Raises:
            SessionClosed: the session has been closed; it must leave the ring that it may have.
            PlanetServeError: as `ChainManager.open_ring` or `mend_ring`.
        """
        ring = self._ring
        if ring is not None and lease_tokens > ring.max_row_tokens:
            await self._leave()  # by their records, its servers would refuse
            ring = None
        if ring is not None and ring.is_broken:
            try:
                await self._manager.mend_ring(ring, num_rows, lease_tokens, history)
            except NoChainAvailable:
                await self._leave()
                ring = None
        self._check_open()
        if ring is None:
            ring = self._ring = await self._manager.open_ring(
                num_rows, lease_tokens, history, self._seed
            )
            self._check_open()
        return ring

    def _after_step(
        self,
        ring: RingSession,
        table: StepTable,
        elapsed_s: float,
        num_rows: int,
        lease_tokens: int,
    ) -> None:
        """Learn from a step that went through, and look for a better chain now and then."""
        self._manager.note_loads(ring.chain, ring.loads_ms, 1000 * elapsed_s)
        if table.is_decode:
            self._relocation.count_decoded(ring.chain, 1000 * elapsed_s)
        position = self.position
        most = None if self._lease_tokens is None else self._lease_tokens - position
        self._relocation.look_if_due(ring.chain, num_rows, lease_tokens, position, most)

    async def _recover(
        self,
        error: PlanetServeError,
        attempt: int,
        lost_s: float,
        num_rows: int,
        lease_tokens: int,
    ) -> float | None:
        """Settle what becomes of the ring; seconds until the next attempt, None if there must not
        be another."""
        ring = self._ring
        chain = None if ring is None else ring.chain
        culprits = await self._manager.report_failure(error, chain, lost_s)
        delay_s = self._manager.retry_delay_s(error, attempt)
        keeps = ring is not None and delay_s is not None and ring.condemn(error, culprits)
        if not keeps:
            await self._leave()
        if delay_s is None:
            return None
        refused = isinstance(error, PeerReportedError) and error.edge is None
        if refused and self._manager.has_chain(num_rows, lease_tokens):
            delay_s = 0.0  # whoever takes the place of one that refuses need not be waited for
        logger.warning("%s (%s); going on without it (attempt %d)", error, error.code, attempt)
        return delay_s

    async def _leave(self) -> None:
        self._relocation.stop()
        ring, self._ring = self._ring, None
        if ring is not None:
            await ring.close()


def _closed_error() -> SessionClosed:
    return SessionClosed("this inference session is closed; open another")
