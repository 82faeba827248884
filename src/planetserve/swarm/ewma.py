"""Moving averages of something measured per peer: a bounded number of them, none too old."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.types import PeerId

_NEWEST_WEIGHT = 0.3


@dataclass(slots=True)
class _Average:
    value: float
    measured_at_s: float


class PeerEwma:
    """Averages of the peers measured last.

    Args:
        max_peers: how many to remember; the one measured longest ago is forgotten first.
        clock: source of monotonic time.
        max_age_s: a peer that was not measured for this long is unknown again.
    """

    def __init__(self, max_peers: int, clock: Clock, max_age_s: float = 600.0):
        self._max_peers = max_peers
        self._clock = clock
        self._max_age_s = max_age_s
        self._averages: OrderedDict[PeerId, _Average] = OrderedDict()

    def add(self, peer_id: PeerId, value: float) -> None:
        """Count in one measurement."""
        known = self.get(peer_id)
        if known is not None:
            value = _NEWEST_WEIGHT * value + (1 - _NEWEST_WEIGHT) * known
        self._averages[peer_id] = _Average(value, self._clock.monotonic())
        self._averages.move_to_end(peer_id)
        if len(self._averages) > self._max_peers:
            self._averages.popitem(last=False)

    def get(self, peer_id: PeerId) -> float | None:
        """The peer's average; None if it is unknown or too old."""
        known = self._averages.get(peer_id)
        if known is None or self.age_s(peer_id) > self._max_age_s:
            return None
        return known.value

    def age_s(self, peer_id: PeerId) -> float:
        """Seconds since the peer was measured; infinite if it never was."""
        known = self._averages.get(peer_id)
        return self._clock.monotonic() - known.measured_at_s if known else float("inf")

    def snapshot(self) -> dict[PeerId, float]:
        """All averages that are not too old."""
        known = ((peer_id, self.get(peer_id)) for peer_id in self._averages)
        return {peer_id: value for peer_id, value in known if value is not None}
