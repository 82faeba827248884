"""What all parts of one sweep share: the graph, the chains met so far, the effort that is left."""

from __future__ import annotations

import math
import time
from bisect import bisect_left

from planetserve.routing.problem import RoutingProblem
from planetserve.routing.run_graph import RunGraph
from planetserve.types import Chain

TOLERANCE = 1e-9
"""Relative difference below which two costs or two rates count as equal."""

Hosts = tuple[int, ...]
"""A chain as one host per block."""


class SearchBudget:
    """One sweep's state.

    Args:
        problem: where to look.
        effort: work to spend, counted in labels of the search (partial chains) of some 2 us each;
            everything else is counted as the labels that would take as long.
        time_limit_s: end earlier after this many seconds, so that a busy machine answers in time.
            The result then depends on the machine.
    """

    def __init__(self, problem: RoutingProblem, effort: int, time_limit_s: float = math.inf):
        self._started_s, self._time_limit_s = time.perf_counter(), time_limit_s
        self.problem = problem
        self.graph = RunGraph.build(problem)
        self.left = effort
        cells = sum(links.size for links in self.graph.links)
        self.pass_effort = 5 * problem.num_blocks + cells // 500
        """Effort of one bound for all blocks."""
        self._priced: dict[Hosts, Chain] = {}
        self._front: list[tuple[float, float, Chain, Hosts]] = []

    def is_over(self, part: float = 1.0) -> bool:
        """Whether the effort is used up, or this fraction of the time."""
        late = time.perf_counter() - self._started_s >= part * self._time_limit_s
        return self.left <= 0 or late

    def spend_passes(self, passes: float) -> None:
        """Count bounds for all blocks, or parts of them."""
        self.left -= int(passes * self.pass_effort)

    def offer(self, hosts: Hosts) -> Chain:
        """The chain of `hosts`, which is remembered if no known one beats it."""
        chain = self._priced.get(hosts)
        if chain is None:
            chain = self._priced[hosts] = self.problem.chain(hosts)
            self._insert(chain, hosts)
        return chain

    def best(self, rate: float) -> tuple[Chain, Hosts] | None:
        """The known chain of least latency with a throughput of at least `rate`."""
        at = bisect_left(self._front, rate, key=lambda entry: entry[0])
        return self._front[at][2:] if at < len(self._front) else None

    def below(self, rate: float) -> Hosts | None:
        """The fastest of the known chains on the front with less throughput than `rate`."""
        at = bisect_left(self._front, rate, key=lambda entry: entry[0])
        return self._front[at - 1][3] if at else None

    def front(self) -> list[Chain]:
        """The chains that no known one beats, least latency first; of nearly equal chains, one."""
        chains: list[Chain] = []
        for _, latency_ms, chain, _ in self._front:
            while chains and chains[-1].latency_ms >= latency_ms * (1 - TOLERANCE):
                chains.pop()
            chains.append(chain)
        return chains

    def _insert(self, chain: Chain, hosts: Hosts) -> None:
        rate, latency_ms = chain.throughput_tokens_per_s, chain.latency_ms
        at = bisect_left(self._front, rate, key=lambda entry: entry[0])
        if at < len(self._front) and self._front[at][1] <= latency_ms:
            return
        end = at
        while end < len(self._front) and self._front[end][0] == rate:
            end += 1
        while at > 0 and self._front[at - 1][1] >= latency_ms:
            at -= 1
        self._front[at:end] = [(rate, latency_ms, chain, hosts)]
