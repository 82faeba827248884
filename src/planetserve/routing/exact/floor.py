"""Least latency under a floor on throughput: bound, price, search, in that order.

One `FloorSolver` serves a whole sweep of rising floors. A chain that is fast enough for one floor
is an upper end for all lower ones, and the prices of the last floor are nearly right for the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planetserve.routing.exact.bounds import Limits, usage
from planetserve.routing.exact.dual import Priced, ascend, unpriced
from planetserve.routing.exact.labels import LabelSearch
from planetserve.routing.exact.matching import deal_out
from planetserve.routing.exact.meter import Meter
from planetserve.routing.exact.neighbourhood import Neighbourhood
from planetserve.routing.exact.work import TOLERANCE, Hosts, Work
from planetserve.types import Chain

_DUAL_STEPS = 12
_FIRST_GAP = 0.004
_WIDEN = 2.0
_HOPELESS = 64.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The best chain found for a floor, and a proven lower bound on the latency of any.

    No chain and an infinite bound: it is proven that none is that fast.
    """

    chain: Chain | None
    lower_ms: float


class FloorSolver:
    """Solves floors in rising order.

    Args:
        work: the sweep that this is a part of.
        stop_at: effort that is left when proofs are given up.
        search_effort: effort that one search may take, so that a hard floor leaves some for others.
    """

    def __init__(self, work: Work, stop_at: int, search_effort: int):
        self._work = work
        self._stop_at = stop_at
        self._search_effort = search_effort
        self._neighbourhood = Neighbourhood(work)
        self._prices: Priced | None = None
        self._floor_ms = 0.0

    @property
    def proving(self) -> bool:
        """Whether there is effort left for proofs."""
        return self._work.left > self._stop_at

    def solve(self, rate: float, dual_steps: int = _DUAL_STEPS) -> Answer:
        """The least latency of chains with a throughput of at least `rate` tokens per second."""
        work = self._work
        limits = Limits.at_rate(work.problem, rate)
        free = unpriced(work.graph, limits)
        work.spend_passes(1)
        if not free.bounds.hosts:
            return Answer(None, math.inf)
        work.offer(free.bounds.hosts)
        # What a lower floor needed at least, this one needs too.
        lower = max(free.lower, self._floor_ms)
        if self._open(rate, lower):
            lower = self._close_gap(rate, limits, free, lower, dual_steps)
        self._floor_ms = lower
        best = work.best(rate)
        return Answer(best and best[0], lower)

    def _best_ms(self, rate: float) -> float:
        best = self._work.best(rate)
        return math.inf if best is None else best[0].latency_ms

    def _open(self, rate: float, lower: float) -> bool:
        """Whether the best known chain might still be beaten."""
        return self._best_ms(rate) > lower * (1 + TOLERANCE)

    def _close_gap(
        self, rate: float, limits: Limits, free: Priced, lower: float, dual_steps: int
    ) -> float:
        work = self._work

        def upper(hosts: Hosts) -> float:
            work.offer(hosts)
            return self._best_ms(rate) * (1 - TOLERANCE)

        priced = ascend(work.graph, limits, (self._prices or free).on(free), upper, dual_steps)
        work.spend_passes(dual_steps)
        if priced.bounds is free.bounds:
            priced = free
        self._prices = priced
        lower = max(lower, priced.lower)
        lower = self._search(rate, limits, priced, lower)
        if self._open(rate, lower):
            self._neighbourhood.improve(priced.bounds.hosts, limits)
        if work.best(rate) is None:
            dealt = deal_out(work.graph, limits)
            if dealt is None:
                return math.inf
            self._neighbourhood.improve(dealt, limits)
        return lower

    def _search(self, rate: float, limits: Limits, priced: Priced, lower: float) -> float:
        """Label searches with a ceiling that rises, and more limits counted, until one answers."""
        work = self._work
        by_block = set(np.flatnonzero(priced.block_price).tolist())
        by_hop = set(np.flatnonzero(priced.hop_price).tolist())
        gap = _FIRST_GAP
        while self.proving and self._open(rate, lower):
            at_most = self._best_ms(rate)
            ceiling = min(lower * (1 + gap), at_most) if gap < _HOPELESS else at_most
            search = LabelSearch(
                work.graph,
                limits,
                Meter.of(limits, by_block, by_hop),
                priced,
                ceiling * (1 + TOLERANCE),
                min(self._search_effort, work.left - self._stop_at),
            )
            found = search.run()
            work.left -= found.effort
            if not found.complete:
                break
            if found.hosts is None:
                if ceiling == at_most:
                    return at_most
                lower, gap = ceiling, gap * _WIDEN
                continue
            cost = work.offer(found.hosts).latency_ms
            lower = max(lower, min(cost, ceiling))
            blocks, hops = limits.broken(*usage(found.hosts, work.problem.num_servers))
            by_block.update(blocks.tolist())
            by_hop.update(hops.tolist())
            if cost > ceiling:
                gap *= _WIDEN
        return lower
