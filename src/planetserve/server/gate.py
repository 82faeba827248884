"""Where a session waits until another of its step frames may be queued.

The decision is `limits.QueuedBytes`; here is only the waiting. A session that waits reads nothing
from its producer, so the producer's stream fills up and stops it, and nobody else.
"""

from __future__ import annotations

import asyncio

from planetserve.server.limits import QueuedBytes
from planetserve.types import PeerId


class StepGate:
    """Shared by all sessions of a server."""

    def __init__(self, queued: QueuedBytes):
        self.queued = queued
        self._waiting: set[asyncio.Future[None]] = set()

    async def enter(
        self, peer: PeerId, num_bytes: int, *, is_only: bool = False, must: bool = False
    ) -> None:
        """Count a frame for `peer`, once it may be queued; `QueuedBytes.take` has the arguments."""
        while not self.queued.take(peer, num_bytes, is_only=is_only, must=must):
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(room)
            try:
                await room
            finally:
                self._waiting.discard(room)

    def leave(self, peer: PeerId, num_bytes: int) -> None:
        """Frames of so many bytes are done with; whoever waits looks again."""
        self.queued.give(peer, num_bytes)
        for room in self._waiting:
            if not room.done():
                room.set_result(None)
