"""Least latency under a floor on throughput: bound, price, search, in that order.

One `FloorSolver` serves a whole sweep of rising floors. It remembers every chain it met, since a
chain that is fast enough for one floor is an upper end for all lower ones, and the prices of the
last floor, which are nearly right for the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planetserve.routing.exact.bounds import Limits, RunGraph, usage
from planetserve.routing.exact.dual import Priced, ascend, unpriced
from planetserve.routing.exact.labels import LabelSearch
from planetserve.routing.exact.matching import deal_out
from planetserve.routing.exact.meter import Meter
from planetserve.routing.exact.repair import feasible_chain
from planetserve.routing.problem import RoutingProblem
from planetserve.types import Chain

TOLERANCE = 1e-9
"""Relative difference below which two costs or two rates count as equal."""
_DUAL_STEPS = 6
_REPAIR_PASSES = 4
"""A repair takes about as long as this many bounds."""
_SEARCH_SHARE = 0.1
"""Part of the effort that one search may take, so that a hard floor leaves some for the rest."""
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

    @property
    def latency_ms(self) -> float:
        return np.inf if self.chain is None else self.chain.latency_ms

    @property
    def gap(self) -> float:
        """By what part of its latency the chain may still be beaten; 0 when that is excluded."""
        if self.chain is None or self.chain.latency_ms <= self.lower_ms * (1 + TOLERANCE):
            return 0.0
        return 1 - self.lower_ms / self.chain.latency_ms


class FloorSolver:
    """Solves floors in rising order on one problem.

    Args:
        effort: how much work to spend over the whole sweep, in partial chains looked at; passes of
            the dynamic programmes are counted as the partial chains that would take as long.
    """

    def __init__(self, problem: RoutingProblem, effort: int):
        self._problem = problem
        self._graph = RunGraph.build(problem)
        cells = sum(links.size for links in self._graph.links)
        self._pass_effort = 2 * problem.num_blocks + cells // 2000
        self._effort_left = effort
        self._search_effort = int(effort * _SEARCH_SHARE)
        self._known: dict[tuple[int, ...], Chain] = {}
        self._prices: Priced | None = None
        self._floor_ms = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the effort is used up, so that answers are no longer proven."""
        return self._effort_left <= 0

    def solve(self, rate: float) -> Answer:
        """The least latency of chains with a throughput of at least `rate` tokens per second."""
        limits = Limits.at_rate(self._problem, rate)
        free = unpriced(self._graph, limits)
        self._effort_left -= self._pass_effort
        if not free.bounds.hosts:
            return Answer(None, np.inf)
        best = self._offer(free.bounds.hosts, rate)
        # What a lower floor needed at least, this one needs too.
        lower = max(free.lower, self._floor_ms)
        if best is None or best.latency_ms > lower * (1 + TOLERANCE):
            best, lower = self._close_gap(rate, limits, free, lower)
        self._floor_ms = lower
        return Answer(best, lower)

    def _offer(self, hosts: tuple[int, ...], rate: float) -> Chain | None:
        """Remember a chain; the best one known that is fast enough for `rate`."""
        if hosts and hosts not in self._known:
            self._known[hosts] = self._problem.chain(hosts)
        fast = [c for c in self._known.values() if c.throughput_tokens_per_s >= rate]
        return min(fast, key=lambda c: c.latency_ms, default=None)

    def _close_gap(
        self, rate: float, limits: Limits, free: Priced, lower: float
    ) -> tuple[Chain | None, float]:
        def upper(hosts: tuple[int, ...]) -> float:
            best = self._offer(hosts, rate)
            return np.inf if best is None else best.latency_ms * (1 - TOLERANCE)

        start = (self._prices or free).on(free)
        steps = 1 if self.exhausted else _DUAL_STEPS
        priced = ascend(self._graph, limits, start, upper, steps)
        self._effort_left -= steps * self._pass_effort
        if priced.bounds is free.bounds:
            priced = free
        self._prices = priced
        lower = max(lower, priced.lower)
        for block_price, hop_price in (
            (priced.block_price, priced.hop_price),
            (free.block_price, free.hop_price),
        )[: 1 if self.exhausted else 2]:
            if upper(()) > lower:
                upper(feasible_chain(self._graph, limits, block_price, hop_price) or ())
                self._effort_left -= _REPAIR_PASSES * self._pass_effort
        best = self._offer((), rate)
        if best is None:
            dealt = deal_out(self._graph, limits)
            if dealt is None:
                return None, np.inf
            best = self._offer(dealt, rate)
        return self._search(rate, limits, priced, lower)

    def _search(
        self, rate: float, limits: Limits, priced: Priced, lower: float
    ) -> tuple[Chain | None, float]:
        """Label searches with a ceiling that rises, and more limits counted, until one answers."""
        by_block = set(np.flatnonzero(priced.block_price).tolist())
        by_hop = set(np.flatnonzero(priced.hop_price).tolist())
        gap = _FIRST_GAP
        best = self._offer((), rate)
        while not self.exhausted and (best is None or best.latency_ms > lower * (1 + TOLERANCE)):
            at_most = np.inf if best is None else best.latency_ms
            ceiling = min(lower * (1 + gap), at_most) if gap < _HOPELESS else at_most
            meter = Meter.of(limits, by_block, by_hop, priced.block_price, priced.hop_price)
            search = LabelSearch(
                self._graph,
                limits,
                meter,
                priced.bounds,
                ceiling * (1 + TOLERANCE),
                min(self._search_effort, self._effort_left),
            )
            found = search.run()
            self._effort_left -= found.labels
            if not found.complete:
                return best, lower
            if found.hosts is None:
                if ceiling == at_most:
                    return best, at_most
                lower, gap = ceiling, gap * _WIDEN
                continue
            best = self._offer(found.hosts, rate)
            cost = self._problem.chain(found.hosts).latency_ms
            lower = max(lower, min(cost, ceiling))
            blocks, hops = limits.broken(*usage(found.hosts, self._problem.num_servers))
            by_block.update(blocks.tolist())
            by_hop.update(hops.tolist())
            if cost > ceiling:
                gap *= _WIDEN
        return best, lower
