"""The asynchronous core of an inference session: rows of KV cache on a chain, and their history.

When hops are lost, the ring gets other hops in their place and the step goes on. When the state of
the remaining hops cannot be trusted either, or no server can take the place, the session opens a
ring on another chain, replays its history there, and sends the step again. Retries are bounded
(`max_retries`); errors that a retry cannot fix are raised at once. `session.py` is the synchronous
interface; one event loop runs any number of these sessions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import torch

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.peer_reports import Reports
from planetserve.client.planning.session_migration import SessionMigration
from planetserve.client.ring.ring import RingSession
from planetserve.client.ring.step_checks import check_step
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


class SessionCore:
    """Rows of one batch, on one chain at a time. Run one step at a time; end with `release`.

    Args:
        manager: finds chains; the session runs on its event loop.
        max_length: as of `InferenceSession`.
        lease_tokens: as of `InferenceSession`.
    """

    def __init__(
        self,
        manager: ChainManager,
        *,
        max_length: int | None = None,
        lease_tokens: int | None = None,
    ):
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ConfigError(f"max_length={max_length!r} is no number of tokens; give 1 or more")
        self.max_length = max_length
        self._closing: asyncio.Future[None] | None = None
        """Keeps the close of the latest ring alive: the event loop has weak references only."""
        self.closed = False
        """Whether the session has been closed; other threads set it before `release` runs."""
        self.ring: RingSession | None = None
        self.history: History | None = None
        """What has entered the ring; None before the first step."""
        self.num_steps = 0
        """Number of steps that have succeeded."""
        self.receipt_errors: list[PlanetServeError] = []
        """What was wrong with the last receipts of servers, of rings that were closed."""
        self._lease_tokens = lease_tokens or max_length
        self._manager = manager
        self._seed = manager.rng.getrandbits(32)
        self._migration = SessionMigration(manager, self._seed)

    @property
    def chain(self) -> Chain | None:
        """The chain in use, or None before the first step."""
        return self.ring.chain if self.ring else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per row; empty before the first step."""
        return self.history.lengths if self.history else ()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Remove the tokens of each row beyond its length here."""
        if self.history is not None:
            # Servers truncate when the next step starts here.
            self.history.truncate(lengths)

    def expect(self, num_tokens: int) -> None:
        """Reserve this many tokens per row the next time that the session opens a ring."""
        if self.max_length is None:
            self._lease_tokens = max(num_tokens, self._lease_tokens or 0)

    def fork(self, rows: Sequence[int] | None = None) -> SessionCore:
        """Another session with the same rows, or with the given ones of them."""
        self.check_open()
        fork = SessionCore(self._manager)
        fork.max_length, fork._lease_tokens = self.max_length, self._lease_tokens
        if self.history is not None:
            chosen = range(len(self.lengths)) if rows is None else rows
            fork.history = self.history.select(chosen)
        return fork

    def check_open(self) -> None:
        """Refuse to work once the session is closed.

        Raises:
            SessionClosed: it is.
        """
        if self.closed:
            raise closed_error()

    def prepare_step(self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor) -> bool:
        """Check a step, and create empty rows if it is the first; returns whether it is.

        Raises:
            SessionClosed: the session has been closed.
            ConfigError: the step does not fit the session.
            SessionLengthError: a row would pass `max_length`.
        """
        self.check_open()
        check_step(num_rows, hidden_TD, len(self.lengths), self._manager.facts.hidden_size)
        longest = max(piece.end for piece in table.rows)
        if self.max_length is not None and longest > self.max_length:
            raise SessionLengthError(
                f"{longest} tokens do not fit the session's max_length={self.max_length}; "
                "open a session with a larger max_length"
            )
        if self.history is not None:
            return False
        self.history = History(num_rows)
        return True

    async def release(self) -> None:
        """Close the session; returns when the servers have been told. Idempotent."""
        self.closed = True
        await self.close_ring()
        if self._closing is not None:  # of whoever has closed it before
            await asyncio.shield(self._closing)

    async def run(
        self, num_rows: int, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool = False
    ) -> torch.Tensor:
        """Run one ragged step after `prepare_step`; `wire/step.py` explains the table.

        Raises:
            SessionClosed: the session has been closed.
            PlanetServeError: no chain could run the step within the bounded retries.
        """
        history = self.history
        if history is None:
            raise closed_error()
        longest = max(piece.end for piece in table.rows)
        lease_tokens = max(longest, self._lease_tokens or 0)
        self._replace_gone(num_rows, lease_tokens)
        loop = asyncio.get_running_loop()
        attempt, reports = 0, Reports()
        while True:
            began_s = loop.time()
            try:
                ring = await self._whole_ring(num_rows, lease_tokens, history)
                if ring.is_waiting:
                    output_TD = await ring.resume()
                else:
                    await self._migration.move(ring, history)
                    started_s = loop.time()
                    output_TD = await ring.step(table, hidden_TD, keep_last=keep_last)
                    if not attempt:
                        elapsed_s = loop.time() - started_s
                        self._after_step(ring, table, elapsed_s, num_rows, lease_tokens)
                history.append(table, hidden_TD)
                self.num_steps += 1
                return output_TD.to(hidden_TD.dtype)
            except PlanetServeError as error:
                if self.closed:
                    # It may come of that, so no server is to blame; whoever closed the session
                    # has not seen a ring that was just being opened.
                    await self.close_ring()
                    raise closed_error() from error
                attempt += 1
                reports.add(error)
                lost_s = loop.time() - began_s
                delay_s = await self._recover(error, attempt, lost_s, num_rows, lease_tokens)
                if delay_s is None:
                    raise reports.final(error, attempt) from error
                await asyncio.sleep(delay_s)
            except asyncio.CancelledError:
                # Ctrl-C in the caller: what the servers hold is unknown, the history is not.
                await self.close_ring()
                raise

    def _replace_gone(self, num_rows: int, lease_tokens: int) -> None:
        """Between two steps, give up hops that left, or will leave and can be replaced."""
        ring = self.ring
        if ring is None:
            return
        if not ring.leaving:
            return
        if self._manager.can_avoid(ring.leaving, num_rows, lease_tokens):
            logger.info("a server is leaving; another takes its place")
            ring.condemn_leaving()

    async def _whole_ring(self, num_rows: int, lease_tokens: int, history: History) -> RingSession:
        """The session's ring, repaired if it was broken, or a new one.

        Raises:
            SessionClosed: the session has been closed; it must leave the ring that it may have.
            PlanetServeError: as `ChainManager.open_ring` or `mend_ring`.
        """
        ring = self.ring
        if ring is not None and lease_tokens > ring.max_row_tokens:
            await self.close_ring()  # by their records, its servers would refuse
            ring = None
        if ring is not None:
            # Servers lost long ago, while the session was idle or waited for another one, may be
            # back: nobody is banned for it.
            now_s = asyncio.get_running_loop().time()
            ring.condemn_lost(now_s - self._manager.config.ban_timeout)
        if ring is not None and ring.is_broken:
            try:
                await self._manager.mend_ring(ring, num_rows, lease_tokens, history)
            except NoChainAvailable:
                await self.close_ring()
                ring = None
        self.check_open()
        if ring is None:
            ring = self.ring = await self._manager.open_ring(
                num_rows, lease_tokens, history, self._seed
            )
            self.check_open()
        return ring

    def _after_step(
        self,
        ring: RingSession,
        table: StepTable,
        elapsed_s: float,
        num_rows: int,
        lease_tokens: int,
    ) -> None:
        """Record the loads of a step, and start a search for a better chain if one is due."""
        self._manager.note_loads(ring.chain, ring.loads_ms, 1000 * elapsed_s)
        if table.is_decode:
            self._migration.count_decoded(ring.chain, 1000 * elapsed_s)
        position = max(self.lengths, default=0)
        most = None if self._lease_tokens is None else self._lease_tokens - position
        self._migration.search_if_due(ring.chain, num_rows, lease_tokens, position, most)

    async def _recover(
        self,
        error: PlanetServeError,
        attempt: int,
        lost_s: float,
        num_rows: int,
        lease_tokens: int,
    ) -> float | None:
        """Decide whether to keep the ring after an error. Returns the seconds until the next
        attempt; None if there must not be another."""
        ring = self.ring
        chain = None if ring is None else ring.chain
        culprits = await self._manager.report_failure(error, chain, lost_s)
        delay_s = self._manager.retry_delay_s(error, attempt)
        keeps = ring is not None and delay_s is not None and ring.condemn(error, culprits)
        if not keeps:
            await self.close_ring()
        if delay_s is None:
            return None
        refused = isinstance(error, PeerReportedError) and error.edge is None
        if refused and self._manager.has_chain(num_rows, lease_tokens):
            delay_s = 0.0  # whoever takes the place of one that refuses need not be waited for
        logger.warning("%s (%s); going on without it (attempt %d)", error, error.code, attempt)
        return delay_s

    async def close_ring(self) -> None:
        """Close the ring; the next step opens another and replays the rows.

        Its servers are told even if the caller is cancelled meanwhile, as by a second Ctrl-C.
        """
        self._migration.stop()
        ring, self.ring = self.ring, None
        if ring is not None:
            self._closing = asyncio.ensure_future(self._end(ring))
            await asyncio.shield(self._closing)

    async def _end(self, ring: RingSession) -> None:
        await ring.close()
        for error in ring.receipt_errors:
            logger.warning("%s (%s); what this session returned may be wrong", error, error.code)
            self.receipt_errors.append(error)
            await self._manager.report_failure(error, None)


def closed_error() -> SessionClosed:
    """What a step of a closed session raises."""
    return SessionClosed("this inference session is closed; open another")
