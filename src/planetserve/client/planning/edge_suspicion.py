"""Pairs of servers between which something went wrong, and which of them to put side by side again.

When one hop complains of another, when nothing passes between two, or when an answer is wrong that
the last hop only passed on, any of those concerned may be at fault, and any of them may lie. What
is known is a graph: servers, and an edge between two that had trouble. A liar can have edges with
everybody and any number of liars can have one with the same honest server, so neither complaints
nor accusers are counted, and edges put nobody on the list of those left alone (`bans.py`). But no
liar can make an edge between two honest servers that work together. Hence two rules:

- two with an edge are not put side by side for a while, if there is another way;
- of several ways, the one whose servers have the fewest edges is taken (`chain_planner.py`).

A chain of honest servers stays open by the first rule. By the second, every attempt that fails
makes what its liars take part in look worse, so that they are not tried with one partner after the
other; and a server that others speak badly of still gets the sessions for which there is nobody
else. Where a whole chain is suspected, all its pairs get an edge, honest ones too, and the rules
leave them for last instead of closing them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planetserve.clock import Clock
from planetserve.types import CLIENT, PeerId

MAX_PAIRS = 256
"""The one that quarrelled longest ago is forgotten first."""

_MAX_DOUBLINGS = 3
"""A pair is avoided for twice as long every time that it edge suspicions again, up to 2^3 times."""
_REMEMBERED = 10
"""A pair is forgotten after this many times the first avoidance period."""

Edge = tuple[PeerId, PeerId]


@dataclass(slots=True)
class _Suspicion:
    last_s: float
    until_s: float
    num_before: int = 0
    """Times that it was avoided before."""
    count: float = 0.0
    """Since it is avoided."""


class EdgeSuspicions:
    """What one client has seen of them, in all its sessions.

    Args:
        avoid_s: how long a pair is avoided for its first suspicion.
        clock: source of monotonic time.
    """

    def __init__(self, avoid_s: float, clock: Clock):
        self._avoid_s = avoid_s
        self._clock = clock
        self._pairs: OrderedDict[Edge, _Suspicion] = OrderedDict()

    def add(self, edge: Edge, weight: float = 1.0) -> list[PeerId]:
        """Take note of trouble between the two ends of an edge.

        Args:
            edge: one of them is at fault, or what is between them,
            weight: with this probability.

        Returns:
            Who is at fault for certain: the server at an edge of the client's own, or at one
            between two hops that it is both.
        """
        if CLIENT in edge or edge[0] == edge[1]:
            return [edge[1] if edge[0] == CLIENT else edge[0]]
        now_s = self._clock.monotonic()
        pair = min(edge), max(edge)
        suspicion = self._pairs.setdefault(pair, _Suspicion(now_s, float("inf")))
        if suspicion.until_s <= now_s:
            suspicion.num_before = min(suspicion.num_before + 1, _MAX_DOUBLINGS)
            suspicion.count = 0
        suspicion.count += weight
        suspicion.last_s = now_s
        suspicion.until_s = now_s + self._avoid_s * 2**suspicion.num_before
        self._pairs.move_to_end(pair)
        forgotten_s = now_s - _REMEMBERED * self._avoid_s
        while len(self._pairs) > MAX_PAIRS or self._oldest_s() < forgotten_s:
            self._pairs.popitem(last=False)
        return []

    def add_chain(self, peers: Sequence[PeerId]) -> list[PeerId]:
        """Take note of a fault that any hop of a chain may have caused.

        Returns:
            Who is at fault for certain: the server of a chain with only one.
        """
        if len(set(peers)) == 1:
            return [peers[0]]
        for edge in pairwise(peers):
            if edge[0] != edge[1]:
                self.add(edge, 1 / (len(peers) - 1))
        return []

    def avoided(self) -> dict[Edge, float]:
        """Pairs that should not be neighbours now, and how much speaks against each: 1 after its
        first suspicion. Many at once, as of sessions that all lead past it, count for little more.
        """
        now_s = self._clock.monotonic()
        return {
            pair: math.log2(1 + suspicion.count)
            for pair, suspicion in self._pairs.items()
            if suspicion.until_s > now_s
        }

    def _oldest_s(self) -> float:
        return next(iter(self._pairs.values())).last_s
