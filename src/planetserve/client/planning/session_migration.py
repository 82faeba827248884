"""Moves a running session to a better chain: it looks now and then, and moves between two steps.

`replanner.py` and `routing/migration.py` decide what is better. A look has a task of its own, so no
step waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.replanner import Running
from planetserve.client.ring.ring import RingSession
from planetserve.errors import NoChainAvailable, PlanetServeError
from planetserve.history import History
from planetserve.routing.migration import MigrationPolicy
from planetserve.types import Chain

logger = logging.getLogger(__name__)


class SessionMigration:
    """One session's. Fed with its steps; `stop` when its ring is left."""

    def __init__(self, manager: ChainManager, seed: int):
        self._manager = manager
        self._seed = seed
        self._migration_policy = MigrationPolicy(manager.config, manager.clock, manager.rng)
        self._num_decoded = 0
        self._looking: asyncio.Task[None] | None = None
        self._target: tuple[Chain, Chain] | None = None
        """The chain that was in use, and the better one."""

    def count_decoded(self, chain: Chain, elapsed_ms: float) -> None:
        """A decode step has gone through, in this time."""
        self._num_decoded += 1
        self._migration_policy.count_step(chain, elapsed_ms)

    def look_if_due(
        self,
        chain: Chain,
        num_rows: int,
        lease_tokens: int,
        position: int,
        most_tokens_left: int | None,
    ) -> None:
        """Begin to look for a better chain, if it is time to.

        Args:
            chain: the chain in use.
            num_rows: of the session.
            lease_tokens: per row that another chain has to have room for.
            position: tokens in the longest row.
            most_tokens_left: that may still be decoded; None if nothing says so.
        """
        if (
            self._looking is not None and not self._looking.done()
        ) or not self._migration_policy.is_due():
            return
        running = Running(
            chain, num_rows, lease_tokens, position, self._migration_policy.measured_ms, self._seed
        )
        # How long a text will be is unknown: probably as long again as it is already.
        tokens_left = float(self._num_decoded)
        if most_tokens_left is not None:
            tokens_left = min(tokens_left, most_tokens_left)
        self._looking = asyncio.create_task(self._look(running, tokens_left))

    async def move(self, ring: RingSession, history: History) -> None:
        """Between two steps: go where a look has found it better to be, if to anywhere.

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
        """Look no further."""
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self, running: Running, tokens_left: float) -> None:
        try:
            if self._migration_policy.may_decide:
                await self._manager.view.refresh()  # others may have moved there since
            offer = await self._manager.find_better(running)
        except PlanetServeError as error:
            logger.debug("no look at other chains: %s", error.code)
            return
        chain = self._migration_policy.decide(offer, tokens_left)
        if chain is not None:
            self._target = running.chain, chain
