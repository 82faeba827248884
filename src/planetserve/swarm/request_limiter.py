"""Rate limit per peer for requests to this node's directory."""

from __future__ import annotations

from collections import Counter

from planetserve.errors import QueueFull
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.types import PeerId


class RequestLimiter:
    """Lets in what peers ask for, and counts what they ask for too often.

    Args:
        buckets: a token for each key that is looked up or stored.
        refused: `refused[name]` is how many requests were turned away.
        name: see `refused`.
    """

    def __init__(self, buckets: TokenBuckets, refused: Counter[str], name: str):
        self._buckets = buckets
        self._refused = refused
        self._name = name

    def enter(self, peer_id: PeerId, num_keys: int) -> None:
        """Count a request for so many keys.

        Raises:
            QueueFull: the peer has asked for too much lately.
        """
        wait_s = self._buckets.take(peer_id, num_keys)
        if wait_s:
            self._refused[self._name] += 1
            raise QueueFull("too many requests from one peer", retry_after_s=wait_s)
