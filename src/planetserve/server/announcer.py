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
_LOOK_PERIOD_S = 10.0
_CHANGE = 1.25
"""A server whose load changes by this factor says so before the period is over."""


class Announcer:
    """Announces what `describe()` returns: every `period_s`, when the load changes, when asked.

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
        self._announced_ms = 0.0

    async def announce(self) -> None:
        """Publish the record now."""
        info = self._describe()
        await self._directory.announce(info, self._ttl_s)
        self._announced_ms = info.decode_ms_per_block

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
        loop = asyncio.get_running_loop()
        due_s = loop.time() + min(_FIRST_ROUND_S, self._period_s)
        while True:
            await asyncio.sleep(max(0.0, min(_LOOK_PERIOD_S, due_s - loop.time())))
            is_due = loop.time() >= due_s
            if not is_due and not self._has_changed():
                continue
            try:
                if is_due:
                    due_s = loop.time() + self._period_s
                    await self._measure()
                await self.announce()
            except PlanetServeError as error:
                logger.warning("cannot announce to the directory: %s", error)

    def _has_changed(self) -> bool:
        now_ms, then_ms = self._describe().decode_ms_per_block, self._announced_ms
        return max(now_ms, then_ms) > _CHANGE * min(now_ms, then_ms)
