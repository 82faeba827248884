"""Keeps the server's directory record fresh: speeds from real steps, distances, memory, state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from planetserve.errors import PlanetServeError
from planetserve.swarm.directory import Directory
from planetserve.types import ServerInfo

logger = logging.getLogger(__name__)

_FIRST_ROUND_S = 5.0
"""A server that has just joined measures its neighbours soon, not after a whole period."""


class Announcer:
    """Announces what `describe()` returns, every `period_s` and whenever asked.

    Args:
        directory: where to announce.
        describe: makes the record.
        measure: brings up to date what is worth waiting for; before each periodic announcement.
        period_s: between two announcements.
        ttl_s: how long each stays valid.
    """

    def __init__(
        self,
        directory: Directory,
        describe: Callable[[], ServerInfo],
        measure: Callable[[], Awaitable[None]],
        period_s: float,
        ttl_s: float,
    ):
        self._directory = directory
        self._describe = describe
        self._measure = measure
        self._period_s = period_s
        self._ttl_s = ttl_s
        self._task: asyncio.Task[None] | None = None

    async def announce(self) -> None:
        """Publish the record now."""
        await self._directory.announce(self._describe(), self._ttl_s)

    def start(self) -> None:
        """Repeat `announce` in the background; a failure is logged and tried again."""
        self._task = asyncio.create_task(self._repeat())

    async def close(self) -> None:
        """Stop, and tell the swarm that this server is gone."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(PlanetServeError, TimeoutError):
            async with asyncio.timeout(3.0):
                await self._directory.withdraw(self._describe())

    async def _repeat(self) -> None:
        pause_s = min(_FIRST_ROUND_S, self._period_s)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._period_s
            try:
                await self._measure()
                await self.announce()
            except PlanetServeError as error:
                logger.warning("cannot announce to the directory: %s", error)
