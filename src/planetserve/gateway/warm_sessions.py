"""Sessions of texts that have ended, kept for a while: a chat's next turn goes on from one.

What the servers hold of the old text and the new prompt have a longest common prefix; the session
is rolled back to its end and continued from there. A key of the API never gets another's session,
so that nobody can tell by the time it takes what others have asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planetserve.client.session_core import SessionCore
from planetserve.gateway.metrics import Metrics

_LEAST_COMMON = 16
"""Tokens for which a session is worth continuing."""


@dataclass(slots=True, eq=False)
class _Warm:
    owner: str
    held_ids: np.ndarray
    session: SessionCore
    reserved_tokens: int
    timer: asyncio.TimerHandle


class WarmSessions:
    """On one event loop; `close` at the end.

    Args:
        max_sessions: that are kept; 0 keeps none.
        timeout_s: how long each is kept.
        metrics: counts prompts and what they reuse.
    """

    def __init__(self, max_sessions: int, timeout_s: float, metrics: Metrics):
        self._max_sessions = max_sessions
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._kept: list[_Warm] = []
        """Oldest first."""
        self._releasing: set[asyncio.Task[None]] = set()
        metrics.watch_warm(lambda: len(self._kept))

    @property
    def reserved_tokens(self) -> int:
        """What servers have promised to all of them."""
        return sum(warm.reserved_tokens for warm in self._kept)

    def take(self, owner: str, ids: Sequence[int]) -> tuple[SessionCore, int] | None:
        """The session that saves most of a prompt, and how many of its tokens that holds; at least
        one is left to compute. It is rolled back already, and the caller's from now on."""
        if not self._max_sessions:
            return None
        wanted = np.array(ids[:-1], dtype=np.int64)
        best, most = None, 0
        for warm in self._kept:
            if warm.owner == owner:
                common = _common(warm.held_ids, wanted)
                # More would be thrown away than saved: another chat with the same beginning.
                if common > most and 2 * common >= len(warm.held_ids):
                    best, most = warm, common
        is_hit = best is not None and most >= _LEAST_COMMON
        self._metrics.prefix_looked_up(len(ids), most if is_hit else 0)
        if best is None or not is_hit:
            return None
        self._kept.remove(best)
        best.timer.cancel()
        best.session.truncate((most,))
        return best.session, most

    def keep(
        self, owner: str, held_ids: Sequence[int], session: SessionCore, reserved_tokens: int
    ) -> None:
        """Take over a session of one row, in which the servers hold these tokens."""
        ids = np.array(held_ids, dtype=np.int64)
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._expire, session)
        self._kept.append(_Warm(owner, ids, session, reserved_tokens, timer))
        if len(self._kept) > self._max_sessions:
            self._drop(self._kept[0])

    async def make_room(self, most_tokens: int) -> None:
        """Close the oldest until no more than this is reserved; returns when servers know."""
        told = []
        while self._kept and self.reserved_tokens > most_tokens:
            told.append(self._drop(self._kept[0]))
        if told:
            await asyncio.gather(*told, return_exceptions=True)

    async def close(self) -> None:
        """Close all; returns when the servers have been told."""
        await self.make_room(-1)
        await asyncio.gather(*self._releasing, return_exceptions=True)

    def _expire(self, session: SessionCore) -> None:
        for warm in [warm for warm in self._kept if warm.session is session]:
            self._drop(warm)

    def _drop(self, warm: _Warm) -> asyncio.Task[None]:
        self._kept.remove(warm)
        warm.timer.cancel()
        task = asyncio.create_task(warm.session.release())
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task


def _common(held: np.ndarray, wanted: np.ndarray) -> int:
    """Length of the longest common prefix."""
    length = min(len(held), len(wanted))
    differs = held[:length] != wanted[:length]
    return int(differs.argmax()) if differs.any() else length
