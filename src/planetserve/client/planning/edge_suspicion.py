"""Pairs of servers between which something went wrong, and which of them to make neighbours again.

When a hop complains of another, when nothing passes between two hops, or when the last hop passes
on a wrong answer, any of the servers concerned may be at fault, and any of them may lie. The
evidence is a graph: servers, and an edge between two that had trouble. A liar can have edges with
every server, and any number of liars can have one with the same honest server. So neither
complaints nor accusers are counted, and edges ban no server (`bans.py`). But no liar can make an
edge between two honest servers that work together.

Hence two rules:

- two servers with an edge are not made neighbours for a while, if there is another chain;
- of several chains, the planner takes the one whose servers have the fewest edges
  (`chain_planner.py`).

The first rule leaves a chain of honest servers open. By the second, every attempt that fails makes
chains with its liars look worse, so that liars are not tried with one partner after the other; and
a server that others accuse still gets the sessions that no other server can take. When a whole
chain is suspected, all its pairs get an edge, honest ones too; the rules then make them the last
choice and do not close them.
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
"""Maximum pairs to remember; the one whose last trouble is oldest is forgotten first."""

_MAX_DOUBLINGS = 3
"""A pair is avoided for twice as long each time that it has trouble again, up to 2^3 times."""
_REMEMBERED = 10
"""Multiple of the first avoidance period after which a pair is forgotten."""

Edge = tuple[PeerId, PeerId]


@dataclass(slots=True)
class _Suspicion:
    last_s: float
    until_s: float
    num_before: int = 0
    """Number of earlier avoidance periods."""
    count: float = 0.0
    """Weight of all trouble in this avoidance period."""


class EdgeSuspicions:
    """The suspicions of one client, over all its sessions.

    Args:
        avoid_s: seconds for which a pair is avoided after its first trouble.
        clock: source of monotonic time.
    """

    def __init__(self, avoid_s: float, clock: Clock):
        self._avoid_s = avoid_s
        self._clock = clock
        self._pairs: OrderedDict[Edge, _Suspicion] = OrderedDict()

    def add(self, edge: Edge, weight: float = 1.0) -> list[PeerId]:
        """Record trouble between the two ends of an edge.

        Args:
            edge: the two peers; one of them is at fault, or the link between them.
            weight: probability of that, in (0, 1].

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
        """Record a fault that any hop of a chain may have caused.

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
        """Pairs that should not be neighbours now, each with a weight: 1 after its first trouble,
        then logarithmic, so that many sessions which fail at once count for little more."""
        now_s = self._clock.monotonic()
        return {
            pair: math.log2(1 + suspicion.count)
            for pair, suspicion in self._pairs.items()
            if suspicion.until_s > now_s
        }

    def _oldest_s(self) -> float:
        return next(iter(self._pairs.values())).last_s
