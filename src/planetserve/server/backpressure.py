"""Where sessions wait until another of their step frames may be read and queued.

The decision is `limits.QueuedBytes`; here is only the waiting. A session that waits has read the
frame's header and nothing behind it, so the producer's stream fills up and stops it, and nobody
else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from planetserve.server.limits import QueuedBytes
from planetserve.types import PeerId


@dataclass(frozen=True, slots=True)
class _Wish:
    num_bytes: int
    is_only: bool


class StepBackpressure:
    """Shared by all sessions of a server."""

    def __init__(self, queued: QueuedBytes):
        self.queued = queued
        # Per peer, who waits, in order of arrival.
        self._waiting: dict[PeerId, dict[asyncio.Future[None], _Wish]] = {}

    async def enter(
        self, peer: PeerId, num_bytes: int, *, is_only: bool = False, must: bool = False
    ) -> None:
        """Count a frame for `peer`, once it may be queued; `QueuedBytes.take` has the arguments."""
        if self.queued.take(peer, num_bytes, is_only=is_only, must=must):
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, {})[room] = _Wish(num_bytes, is_only)
        try:
            await room
        except asyncio.CancelledError:
            if room.done() and not room.cancelled():
                self.leave(peer, num_bytes)  # let in at the same moment
            raise
        finally:
            waiting = self._waiting.get(peer)
            if waiting is not None:
                waiting.pop(room, None)
                if not waiting:
                    del self._waiting[peer]

    def leave(self, peer: PeerId, num_bytes: int) -> None:
        """Frames of so many bytes are done with; who waited for that goes on."""
        self.queued.give(peer, num_bytes)
        # Nearly always it is the same peer that waits, for what it has queued itself.
        self._let_in(peer)
        if len(self._waiting) > (peer in self._waiting):
            for other in list(self._waiting):
                self._let_in(other)

    def _let_in(self, peer: PeerId) -> None:
        for room, wish in self._waiting.get(peer, {}).items():
            if room.done():
                continue
            if not self.queued.take(peer, wish.num_bytes, is_only=wish.is_only):
                return
            room.set_result(None)


class PeerBackpressure:
    """What one session has in the gate. `close` gives all of it back, whoever still holds some."""

    def __init__(self, gate: StepBackpressure, peer: PeerId):
        self._gate = gate
        self._peer = peer
        self._num_bytes = 0
        self._is_closed = False

    async def enter(self, num_bytes: int, *, must: bool = False) -> None:
        """Wait until a frame of so many bytes may be read."""
        await self._gate.enter(self._peer, num_bytes, is_only=not self._num_bytes, must=must)
        if self._is_closed:
            self._gate.leave(self._peer, num_bytes)
        else:
            self._num_bytes += num_bytes

    def leave(self, num_bytes: int) -> None:
        """A frame is done with."""
        if not self._is_closed:
            self._num_bytes -= num_bytes
            self._gate.leave(self._peer, num_bytes)

    def close(self) -> None:
        """The session has ended."""
        if not self._is_closed:
            self._is_closed = True
            self._gate.leave(self._peer, self._num_bytes)
