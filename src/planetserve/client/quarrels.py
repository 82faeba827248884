"""Pairs of servers between which something went wrong, and who stands out among them.

When one hop complains of another, or nothing passes between two, either may be at fault, and either
may lie. So neither is left out for it: the client avoids the pair for a while. A hop that complains
of one neighbour after another is the more likely culprit, and so is one with which hardly anybody
gets along. It takes several peers to bring that about, never one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from planetserve.clock import Clock
from planetserve.types import CLIENT, PeerId

MAX_PAIRS = 256
"""The one that quarrelled longest ago is forgotten first."""

_COMPLAINTS = 2
"""So many others has a suspect complained of,"""
_QUARRELS = 3
"""or had a quarrel with, whoever complained."""
_REMEMBERED = 10
"""Times as long as pairs are avoided."""

Edge = tuple[PeerId, PeerId]


@dataclass(slots=True)
class _Quarrel:
    last_s: float
    complainants: set[PeerId] = field(default_factory=set)


class Quarrels:
    """What one client has seen of them, in all its sessions.

    Args:
        avoid_s: how long a pair is avoided.
        clock: source of monotonic time.
    """

    def __init__(self, avoid_s: float, clock: Clock):
        self._avoid_s = avoid_s
        self._clock = clock
        self._pairs: OrderedDict[Edge, _Quarrel] = OrderedDict()

    def add(self, edge: Edge, claimed_by: PeerId | None) -> list[PeerId]:
        """Take note of a quarrel.

        Args:
            edge: the two ends of an edge.
            claimed_by: the one that complains of the other; None if the client has seen for itself
                that nothing passes.

        Returns:
            Those of the two that are to be left out.
        """
        if CLIENT in edge:
            return [peer for peer in edge if peer != CLIENT]  # what a client sees of its own edges
        now_s = self._clock.monotonic()
        pair = min(edge), max(edge)
        quarrel = self._pairs.setdefault(pair, _Quarrel(now_s))
        quarrel.last_s = now_s
        if claimed_by is not None:
            quarrel.complainants.add(claimed_by)
        self._pairs.move_to_end(pair)
        forgotten_s = now_s - _REMEMBERED * self._avoid_s
        while len(self._pairs) > MAX_PAIRS or self._oldest_s() < forgotten_s:
            self._pairs.popitem(last=False)
        return [peer for peer in edge if self._is_suspect(peer)]

    def avoided(self) -> set[Edge]:
        """Pairs that should not be neighbours now."""
        since_s = self._clock.monotonic() - self._avoid_s
        return {pair for pair, quarrel in self._pairs.items() if quarrel.last_s > since_s}

    def _oldest_s(self) -> float:
        return next(iter(self._pairs.values())).last_s

    def _is_suspect(self, peer: PeerId) -> bool:
        if self._complains_much(peer):
            return True
        others = [other for other in self._with(peer) if not self._complains_much(other)]
        return len(others) >= _QUARRELS

    def _complains_much(self, peer: PeerId) -> bool:
        quarrels = self._with(peer).values()
        return sum(peer in quarrel.complainants for quarrel in quarrels) >= _COMPLAINTS

    def _with(self, peer: PeerId) -> Mapping[PeerId, _Quarrel]:
        """The quarrels of a peer, by the other one."""
        return {
            two if one == peer else one: quarrel
            for (one, two), quarrel in self._pairs.items()
            if peer in (one, two)
        }
