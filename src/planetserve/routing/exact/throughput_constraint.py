"""Least latency under a floor on throughput: bound, price, search, in that order.

One `ThroughputConstraint` serves a whole sweep. A chain that is fast enough for one floor is an
upper bound for all lower ones, and the prices of one floor are nearly right for the next.
"""

from __future__ import annotations

import math

import numpy as np

from planetserve.routing.exact.label_setting import LabelSearch
from planetserve.routing.exact.lagrangian import Priced, ascend, unpriced
from planetserve.routing.exact.large_neighbourhood_search import LargeNeighbourhoodSearch
from planetserve.routing.exact.matching import assign_blocks
from planetserve.routing.exact.packed_counts import PackedCounts
from planetserve.routing.exact.search_budget import TOLERANCE, Hosts, SearchBudget
from planetserve.routing.run_graph import Limits, usage
from planetserve.types import Chain

_DUAL_STEPS = 12
_EASY = 25
"""Effort, in bounds for all blocks, of the first search for a proof."""
_MORE_STEPS = 50
"""Additional price steps where that search is not enough: if a gap stays, better prices cost less
than the partial chains that worse prices leave."""
_PROVABLE = 0.03
"""Maximum relative gap between a chain and the bound that a second search tries to close."""
_FIRST_GAP = 0.004
"""Relative distance of the first ceiling above the bound."""
_WIDEST_GAP = 0.03
"""Maximum of that distance, for floors after one whose answer was farther from its bound."""
_WIDEN = 2.0
_HOPELESS = 64.0


class ThroughputConstraint:
    """Solves floors in any order, and remembers the bounds of all.

    Args:
        work: the sweep that this is a part of.
        search_effort: effort that one search for a proof may take.
    """

    def __init__(self, work: SearchBudget, search_effort: int):
        self._work = work
        self._search_effort = search_effort
        self._neighbourhood = LargeNeighbourhoodSearch(work)
        self._prices: list[tuple[float, Priced]] = []
        self._gap = _FIRST_GAP
        self.floors: list[tuple[float, float]] = []
        """Throughputs, and lower bounds on the latency of all chains that reach them."""

    def lower_ms(self, rate: float) -> float:
        """A bound on the latency of all chains that reach `rate`; infinite if there are none."""
        # What a lower floor needs at least, a higher one needs too.
        return max((lower for floor, lower in self.floors if floor <= rate), default=0.0)

    def prove(self, rate: float, effort: int) -> Chain | None:
        """The chain of least latency with a throughput of at least `rate` tokens per second.

        Args:
            effort: of the search for it and its proof. If that is not enough, the answer is the
                best chain known, and `lower_ms` tells how good it is.
        """
        self._solve(rate, 0, min(effort, self._search_effort))
        best = self._work.best(rate)
        return best and best[0]

    def look(self, rate: float, beam: int, prove: bool) -> None:
        """Offer what a search along the `beam` most promising partial chains finds for `rate`.

        Args:
            prove: then try to close the gap, if it is small.
        """
        self._solve(rate, beam, self._search_effort if prove else 0)

    def _solve(self, rate: float, beam: int, effort: int) -> None:
        work = self._work
        limits = Limits.at_rate(work.problem, rate)
        free = unpriced(work.graph, limits)
        work.spend_passes(1)
        lower = max(free.lower, self.lower_ms(rate))
        if free.bounds.hosts:
            work.offer(free.bounds.hosts)
            if self._open(rate, lower):
                lower = self._close_gap(rate, limits, free, lower, beam, effort)
        self.floors.append((rate, lower))

    def _best_ms(self, rate: float) -> float:
        best = self._work.best(rate)
        return math.inf if best is None else best[0].latency_ms

    def _open(self, rate: float, lower: float) -> bool:
        """Whether the best known chain might still be beaten."""
        return self._best_ms(rate) > lower * (1 + TOLERANCE)

    def _close_gap(
        self, rate: float, limits: Limits, free: Priced, lower: float, beam: int, effort: int
    ) -> float:
        work = self._work
        priced = self._priced(rate, limits, free, _DUAL_STEPS)
        lower = max(lower, priced.lower)
        if effort > 0 and not beam:
            easy = min(effort, _EASY * work.pass_effort)
            lower, used = self._search(rate, limits, priced, lower, easy)
            effort -= used
            if effort > 0 and self._open(rate, lower):
                priced = self._priced(rate, limits, free, _MORE_STEPS)
                lower = max(lower, priced.lower)
                lower, _ = self._search(rate, limits, priced, lower, effort)
        if beam and self._open(rate, lower):
            self._follow(limits, priced, self._best_ms(rate), beam)
            if effort > 0 and self._best_ms(rate) <= lower * (1 + _PROVABLE):
                lower, _ = self._search(rate, limits, priced, lower, effort)
        if work.best(rate) is None:
            assigned = assign_blocks(work.graph, limits)
            if assigned is None:
                return math.inf
            self._neighbourhood.improve(assigned, limits)
        return lower

    def _priced(self, rate: float, limits: Limits, free: Priced, steps: int) -> Priced:
        """Prices for the limits, found from those of the nearest floor."""

        def upper(hosts: Hosts) -> float:
            self._work.offer(hosts)
            self._work.spend_passes(1)
            return self._best_ms(rate) * (1 - TOLERANCE)

        nearest = min(self._prices, key=lambda known: abs(known[0] - rate), default=(rate, free))
        priced = ascend(self._work.graph, limits, nearest[1].on(free), upper, steps)
        if priced.bounds is free.bounds:
            priced = free
        self._prices.append((rate, priced))
        return priced

    def _follow(self, limits: Limits, priced: Priced, best_ms: float, beam: int) -> None:
        """Look for a chain along the partial ones that the priced bounds find most promising."""
        work = self._work
        packed_counts = PackedCounts.binding(limits, work.problem.legal)
        ceiling = best_ms * (1 - TOLERANCE)
        found = LabelSearch(work.graph, limits, packed_counts, priced, ceiling, beam=beam).run()
        work.left -= found.effort
        if found.hosts is not None:
            work.offer(found.hosts)

    def _search(
        self, rate: float, limits: Limits, priced: Priced, lower: float, effort: int
    ) -> tuple[float, int]:
        """Label searches with a ceiling that rises, and more limits counted, until one answers.

        Returns:
            The bound that is proven now, and the effort spent.
        """
        work, spent = self._work, 0
        by_block = set(np.flatnonzero(priced.block_price).tolist())
        by_hop = set(np.flatnonzero(priced.hop_price).tolist())
        gap = self._gap
        while spent < effort and self._open(rate, lower):
            at_most = self._best_ms(rate)
            ceiling = min(priced.lower * (1 + gap), at_most) if gap < _HOPELESS else at_most
            if ceiling <= lower:
                gap *= _WIDEN
                continue
            search = LabelSearch(
                work.graph,
                limits,
                PackedCounts.of(limits, by_block, by_hop),
                priced,
                ceiling * (1 + TOLERANCE),
                effort - spent,
            )
            found = search.run()
            work.left -= found.effort
            spent += found.effort
            if not found.complete:
                break
            if found.hosts is None:
                if ceiling == at_most:
                    lower = at_most
                    break
                lower, gap = ceiling, gap * _WIDEN
                continue
            cost = work.offer(found.hosts).latency_ms
            lower = max(lower, min(cost, ceiling))
            blocks, hops = limits.broken(*usage(found.hosts, work.problem.num_servers))
            by_block.update(blocks.tolist())
            by_hop.update(hops.tolist())
            if cost > ceiling:
                gap *= _WIDEN
        if priced.lower > 0 and not self._open(rate, lower):
            self._gap = min(_WIDEST_GAP, _FIRST_GAP + self._best_ms(rate) / priced.lower - 1)
        return lower, spent
