"""Chains by changing a part of one: large neighbourhood search (Shaw, 1998).

A window of blocks is planned again with what the rest of the chain leaves of every limit. Moving
the window over a chain makes the chain cheaper. Placing it where a chain breaks a limit makes the
chain legal, so a good chain for one throughput leads to one for a slightly higher throughput.
"""

from __future__ import annotations

import numpy as np

from planetserve.routing.exact.label_setting import LabelSearch
from planetserve.routing.exact.lagrangian import Priced
from planetserve.routing.exact.packed_counts import PackedCounts
from planetserve.routing.exact.search_budget import Hosts, SearchBudget
from planetserve.routing.run_graph import (
    Limits,
    RunGraph,
    Stretch,
    between,
    cheapest_runs,
    usage,
)

_WINDOW = 20
_BEAM = 24


class LargeNeighbourhoodSearch:
    """Changes chains of one sweep, and offers the results to it."""

    def __init__(self, work: SearchBudget):
        self._work = work
        self._graph = work.graph
        self._shift = 0

    def improve(self, hosts: Hosts, limits: Limits) -> Hosts | None:
        """A chain within `limits` that is like `hosts` and cheap, or None if none was found."""
        settled = self.settle(hosts, limits)
        if settled is None:
            return None
        self._work.offer(settled)
        return self.polish(settled, limits)

    def settle(self, hosts: Hosts, limits: Limits) -> Hosts | None:
        """A chain within `limits` that is like `hosts`, or None if none was found."""
        n = self._graph.problem.num_servers
        for _ in range(2 * n):
            over = np.concatenate(limits.broken(*usage(hosts, n)))
            if not len(over):
                return hosts
            changed = self._relieve(hosts, limits, int(over[0]))
            if changed is None:
                return None
            hosts = changed
        return None

    def polish(self, hosts: Hosts, limits: Limits) -> Hosts:
        """`hosts`, cheaper if a window finds something cheaper; windows shift from call to call."""
        num_blocks = len(hosts)
        self._shift = _WINDOW // 2 - self._shift
        for start in range(-self._shift, num_blocks, _WINDOW):
            part = max(0, start), min(num_blocks, start + _WINDOW)
            hosts = self._anew(hosts, limits, *part, cheaper=True) or hosts
        self._work.offer(hosts)
        return hosts

    def _relieve(self, hosts: Hosts, limits: Limits, server: int) -> Hosts | None:
        """Plan anew around the longest run of `server`, in ever larger windows."""
        places = np.flatnonzero(np.asarray(hosts) == server)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        longest = max(runs, key=len)
        first, last = int(longest[0]), int(longest[-1])
        pad = 2
        while True:
            start, end = max(0, first - pad), min(len(hosts), last + 1 + pad)
            changed = self._anew(hosts, limits, start, end, cheaper=False)
            if changed is not None or end - start == len(hosts):
                return changed
            pad *= 3

    def _anew(
        self, hosts: Hosts, limits: Limits, start: int, end: int, *, cheaper: bool
    ) -> Hosts | None:
        """The chain with `[start, end)` planned anew, or None if nothing (cheaper) is found."""
        graph, n = self._graph, self._graph.problem.num_servers
        self._work.spend_passes((end - start) / len(hosts))
        before, after = usage(hosts[:start], n), usage(hosts[end:], n)
        blocks, hops = limits.blocks - before[0] - after[0], limits.hops - before[1] - after[1]
        for neighbour in (*hosts[start - 1 : start], *hosts[end : end + 1]):
            hops[neighbour] += 1  # going on with it is no further visit
        usable = (blocks > 0) & (hops > 0)
        left = Limits(np.where(usable, blocks, 0), np.where(usable, hops, 0))
        part = between(graph.problem, hosts, start, end)
        priced = _unpriced(graph, left, part)
        if not priced.bounds.hosts:
            return None
        most = self._cost(hosts, part) * (1 - 1e-9) if cheaper else np.inf
        found = self._search(left, part, priced, most)
        if not found:
            return None
        changed = hosts[:start] + found + hosts[end:]
        better = self._excess(changed, limits) < self._excess(hosts, limits)
        return changed if better or (cheaper and not self._excess(changed, limits)) else None

    def _excess(self, hosts: Hosts, limits: Limits) -> int:
        """By how many blocks and visits the limits are broken."""
        blocks, hops = usage(hosts, self._graph.problem.num_servers)
        over = np.maximum(blocks - limits.blocks, 0) + np.maximum(hops - limits.hops, 0)
        return int(over.sum())

    def _search(self, left: Limits, part: Stretch, priced: Priced, most: float) -> Hosts | None:
        if priced.bounds.total > most:
            return None
        packed_counts = PackedCounts.binding(left, self._graph.problem.legal[part.start : part.end])
        search = LabelSearch(self._graph, left, packed_counts, priced, most, beam=_BEAM, part=part)
        found = search.run()
        self._work.left -= found.effort
        return found.hosts

    def _cost(self, hosts: Hosts, part: Stretch) -> float:
        problem = self._graph.problem
        inside = np.asarray(hosts[part.start : part.end])
        enters = np.append(True, inside[1:] != inside[:-1])
        cost = part.arrive[inside[0]] + part.leave[inside[-1]]
        cost += problem.decode_ms[inside].sum() + problem.hop_ms[inside[enters]].sum()
        return float(cost + problem.links.pairs(inside[:-1], inside[1:]).sum())


def _unpriced(graph: RunGraph, limits: Limits, part: Stretch) -> Priced:
    problem = graph.problem
    free = np.zeros(problem.num_servers)
    bounds = cheapest_runs(graph, limits, problem.decode_ms, problem.hop_ms, part)
    return Priced(free, free, bounds, bounds.total)
