"""The streams that others open: how many there may be, in all and of one peer."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from planetserve.swarm.libp2p.daemon import Daemon
from planetserve.swarm.libp2p.streams import short
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

MAX_STREAMS = 4096
"""Maximum number of incoming streams; further ones are closed unread. It is a quarter of the open
files that the system allows this process, if that is fewer."""
STREAMS_SHARE_PER_PEER = 4
"""Maximum share of these streams that one peer may hold, as a divisor."""

Serve = Callable[[socket.socket, bytes, PeerId], Coroutine[Any, Any, None]]
"""Serves an incoming stream: its socket, bytes of it that were read already, who opened it."""
Spawn = Callable[[Coroutine[Any, Any, None], str], None]
"""Runs something in a task with a name."""


class IncomingStreams:
    """Takes from the daemon the streams that there is room for, and closes the others.

    Args:
        daemon: hands them over.
        spawn: runs what serves a stream.
        refused: `refused["stream"]` is how many were closed.
        max_streams: held at once.
    """

    def __init__(self, daemon: Daemon, spawn: Spawn, refused: Counter[str], max_streams: int):
        self.max_streams = max_streams
        self.num_open: Counter[PeerId] = Counter()
        self._daemon = daemon
        self._spawn = spawn
        self._refused = refused
        self._is_stopped = False

    def stop(self) -> None:
        """Take no more streams."""
        self._is_stopped = True

    async def serve(self, protocol: str, serve: Serve) -> None:
        """Run `serve` in a task for each stream of `protocol` that there is room for.

        Raises:
            TransportError: the daemon does not answer.
        """

        async def counted(sock: socket.socket, head: bytes, remote: PeerId) -> None:
            try:
                await serve(sock, head, remote)
            finally:
                self.num_open[remote] -= 1
                if not self.num_open[remote]:
                    del self.num_open[remote]

        def accept(remote: PeerId, sock: socket.socket, head: bytes) -> None:
            if not self._has_room(remote):
                sock.close()
                self._refused["stream"] += 1
                logger.debug("refused a stream from %s: too many, or closing", short(remote))
                return
            self.num_open[remote] += 1
            self._spawn(counted(sock, head, remote), f"{protocol} from {short(remote)}")

        await self._daemon.add_protocol(protocol, accept)

    def _has_room(self, remote: PeerId) -> bool:
        if self._is_stopped or self.num_open.total() >= self.max_streams:
            return False
        return self.num_open[remote] < max(1, self.max_streams // STREAMS_SHARE_PER_PEER)
