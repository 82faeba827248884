"""How much a peer may ask for: token buckets, a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict

from planetserve.clock import Clock
from planetserve.types import PeerId

MAX_BUCKETS = 4096
"""Maximum number of peers with a bucket; the least recently seen is dropped first."""


class TokenBuckets:
    """A token bucket per peer: `burst` tokens at most, `per_s` new ones every second.

    Peers whose bucket is full again are forgotten, so there are as many entries as peers that
    asked within `burst / per_s` seconds, and at most `MAX_BUCKETS`.
    """

    def __init__(self, per_s: float, burst: int, clock: Clock):
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        # Peer -> (tokens, when they were counted), the peer counted longest ago first.
        self._buckets: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, peer: PeerId, count: float = 1.0) -> float:
        """Take tokens; returns 0, or how many seconds to wait if there are too few.

        More than a full bucket are as many as a full bucket.
        """
        count = min(count, self._burst)
        now_s = self._clock.monotonic()
        self._forget_full(now_s)
        tokens, since_s = self._buckets.get(peer, (float(self._burst), now_s))
        tokens = min(self._burst, tokens + (now_s - since_s) * self._per_s)
        wait_s = max(0.0, (count - tokens) / self._per_s)
        self._buckets[peer] = (tokens if wait_s else tokens - count, now_s)
        self._buckets.move_to_end(peer)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return wait_s

    def _forget_full(self, now_s: float) -> None:
        while self._buckets:
            peer, (tokens, since_s) = next(iter(self._buckets.items()))
            if tokens + (now_s - since_s) * self._per_s < self._burst:
                return
            del self._buckets[peer]
