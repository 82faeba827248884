"""Moves a running session to a better chain: searches from time to time, moves between two steps.

`replanner.py` and `routing/migration.py` decide which chain is better. A search runs in a task of
its own, so that no step waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.replanner import RunningSession
from planetserve.client.ring.ring import RingSession
from planetserve.errors import NoChainAvailable, PlanetServeError
from planetserve.history import History
from planetserve.routing.migration import MigrationPolicy
from planetserve.types import Chain

logger = logging.getLogger(__name__)


class SessionMigration:
    """The migration of one session. Call `stop` when the session closes its ring."""

    def __init__(self, manager: ChainManager, seed: int):
        self._manager = manager
        self._seed = seed
        self._migration_policy = MigrationPolicy(manager.config, manager.clock, manager.rng)
        self._num_decoded = 0
        self._search: asyncio.Task[None] | None = None
        self._target: tuple[Chain, Chain] | None = None
        """The chain that was in use, and the better one."""

    def count_decoded(self, chain: Chain, elapsed_ms: float) -> None:
        """A decode step has succeeded in this time."""
        self._num_decoded += 1
        self._migration_policy.count_step(chain, elapsed_ms)

    def search_if_due(
        self,
        chain: Chain,
        num_rows: int,
        lease_tokens: int,
        position: int,
        most_tokens_left: int | None,
    ) -> None:
        """Start a search for a better chain, if one is due.

        Args:
            chain: the chain in use.
            num_rows: rows of the session.
            lease_tokens: tokens per row that another chain must have room for.
            position: tokens in the longest row.
            most_tokens_left: maximum tokens that may still be decoded; None if unknown.
        """
        if (
            self._search is not None and not self._search.done()
        ) or not self._migration_policy.is_due():
            return
        running = RunningSession(
            chain, num_rows, lease_tokens, position, self._migration_policy.measured_ms, self._seed
        )
        # How long a text will be is unknown: probably as long again as it is already.
        tokens_left = float(self._num_decoded)
        if most_tokens_left is not None:
            tokens_left = min(tokens_left, most_tokens_left)
        self._search = asyncio.create_task(self._find_target(running, tokens_left))

    async def move(self, ring: RingSession, history: History) -> None:
        """Move the ring, between two steps, to the better chain that a search has found, if any.

        Raises:
            PlanetServeError: as `ChainManager.move_ring`; the ring is broken then.
        """
        target, self._target = self._target, None
        if target is None or target[0] != ring.chain:
            return
        logger.info("moving from %s to %s", *target)
        with contextlib.suppress(NoChainAvailable):
            await self._manager.move_ring(ring, target[1], history)

    def stop(self) -> None:
        """Cancel the search that is under way."""
        if self._search is not None:
            self._search.cancel()

    async def _find_target(self, running: RunningSession, tokens_left: float) -> None:
        try:
            if self._migration_policy.may_decide:
                await self._manager.view.refresh()  # others may have moved there since
            offer = await self._manager.find_better(running)
        except PlanetServeError as error:
            logger.debug("no search for a better chain: %s", error.code)
            return
        chain = self._migration_policy.decide(offer, tokens_left)
        if chain is not None:
            self._target = running.chain, chain
