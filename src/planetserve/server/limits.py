"""What one peer may hold at a server, and how often it may ask: decisions, without I/O.

`Admission` says whether a peer may open another session; `QueuedBytes` says whether another step
frame may be queued. Both answer at once, from counters that the event loop's thread owns, and
neither waits. Memory of the KV cache is shared out by `scheduler/kv_reservations.py`.

A peer id costs nothing, so a limit per peer bounds what one stranger does by accident or with
little effort; the limits on the whole server bound what many ids can do together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.errors import ConfigError, QueueFull
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.types import PeerId

SMALL_FRAME_BYTES = 64 * 1024
"""A step frame up to this size is one of decoding, not a piece of a prompt."""

_SESSIONS_RETRY_S = 5.0
_RESERVED_SHARE = 0.25
"""Part of all that may be queued which only peers with nothing queued get."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on what strangers may hold and ask for; `ServerConfig` documents each.

    Raises:
        ConfigError: a limit that nothing could pass.
    """

    max_sessions: int = 1024
    max_peer_sessions: int = 256
    max_peer_opens: float = 1200.0
    """Sessions per minute that one peer may open in the long run."""
    peer_open_burst: int = 200
    """Sessions that a peer which has been quiet may open at once."""
    max_queued_bytes: int = 512 << 20
    max_peer_queued_bytes: int = 64 << 20
    session_timeout_s: float = 1800.0
    step_timeout_s: float = 300.0
    max_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        counts = (self.max_sessions, self.max_peer_sessions, self.peer_open_burst,
                  self.max_queued_bytes, self.max_peer_queued_bytes)  # fmt: skip
        if min(counts) < 1 or not self.max_peer_opens > 0:
            raise ConfigError("a limit below one lets nobody in; give positive numbers")


class Admission:
    """Who may open a session now."""

    def __init__(self, limits: ServerLimits, clock: Clock):
        self._limits = limits
        self._buckets = TokenBuckets(limits.max_peer_opens / 60.0, limits.peer_open_burst, clock)
        self._open: Counter[PeerId] = Counter()

    def ask(self, peer: PeerId) -> None:
        """Count an attempt to open a session, whatever comes of it.

        Raises:
            QueueFull: too many attempts lately, or too many sessions open; says when to ask again.
        """
        wait_s = self._buckets.take(peer)
        if wait_s:
            raise QueueFull(
                f"one peer may open {self._limits.max_peer_opens:g} sessions a minute here "
                "(--max_peer_opens)",
                retry_after_s=wait_s,
            )
        self.check_room(peer)

    def check_room(self, peer: PeerId) -> None:
        """Whether the peer may open another session, as of now.

        Raises:
            QueueFull: too many sessions are open; says when to ask again.
        """
        num_sessions = self._open.total()
        if num_sessions >= self._limits.max_sessions:
            raise QueueFull(
                f"{num_sessions} sessions are open here, as many as may be (--max_sessions)",
                retry_after_s=_SESSIONS_RETRY_S,
            )
        if self._open[peer] >= self._limits.max_peer_sessions:
            raise QueueFull(
                f"one peer may hold {self._limits.max_peer_sessions} sessions here "
                "(--max_peer_sessions); close one first",
                retry_after_s=_SESSIONS_RETRY_S,
            )

    def opened(self, peer: PeerId) -> None:
        """A session of the peer has been opened."""
        self._open[peer] += 1

    def closed(self, peer: PeerId) -> None:
        """A session of the peer has ended."""
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]


class QueuedBytes:
    """Bytes of step frames that may be read, or were, and whose results have not been sent on yet.

    Counted for the peer that opened the session, since it decides who sends and who consumes. A
    part of the whole (`_RESERVED_SHARE`) is for peers that have nothing queued, so that hoards of
    others do not stop them; each may queue one frame, whatever its size. A session with nothing
    queued may always queue a small one, so that a stuck prompt does not stop the decoding of the
    same peer's other sessions: `max_sessions` bounds how many of those come on top of the whole.
    """

    def __init__(self, limits: ServerLimits):
        self._max_total = limits.max_queued_bytes
        self._max_shared = int(limits.max_queued_bytes * (1 - _RESERVED_SHARE))
        self._max_per_peer = limits.max_peer_queued_bytes
        self._per_peer: Counter[PeerId] = Counter()
        self.total = 0
        """Bytes queued now."""

    def of(self, peer: PeerId) -> int:
        """Bytes queued now in the peer's sessions."""
        return self._per_peer[peer]

    def take(
        self, peer: PeerId, num_bytes: int, *, is_only: bool = False, must: bool = False
    ) -> bool:
        """Count `num_bytes` for the peer if they may be queued; says whether they were counted.

        Args:
            peer: who opened the session.
            num_bytes: the frame's payload.
            is_only: nothing else of the frame's session is queued.
            must: the rest of a step whose beginning waits for it, within what the session has
                leased: counted in any case.
        """
        if not (
            must
            or (is_only and num_bytes <= SMALL_FRAME_BYTES)
            or self._fits(self._per_peer[peer], num_bytes)
        ):
            return False
        self._per_peer[peer] += num_bytes
        self.total += num_bytes
        return True

    def _fits(self, held: int, num_bytes: int) -> bool:
        if not held:
            # Where nothing at all is queued, the largest frame passes the smallest limit.
            return self.total + num_bytes <= self._max_total or not self.total
        fits_peer = held + num_bytes <= self._max_per_peer
        return fits_peer and self.total + num_bytes <= self._max_shared

    def give(self, peer: PeerId, num_bytes: int) -> None:
        """The results of `num_bytes` have been sent on, or their session has ended."""
        self.total -= num_bytes
        self._per_peer[peer] -= num_bytes
        if not self._per_peer[peer]:
            del self._per_peer[peer]
