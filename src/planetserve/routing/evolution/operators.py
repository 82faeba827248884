"""How individuals are made, crossed, changed and repaired. Every result is legal."""

from __future__ import annotations

import math

import numpy as np

from planetserve.routing.arrays import IntArray
from planetserve.routing.evolution.objectives import evaluate, run_starts
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.run_graph import Limits, RunGraph, between, cheapest_runs, usage

Rng = np.random.Generator

_NOISE = 0.5
"""Spread of the random factors on costs when a stretch is routed again."""
_TRIES = 4
"""Number of routes tried for one stretch; after each, the servers that it overused cost more."""
_RAISE = 0.5
"""Maximum increase of a server's cost from one try to the next, as a fraction of the cost."""


class Operators:
    """Operators on the hosts of one problem; all randomness comes from the generator passed in."""

    def __init__(self, problem: RoutingProblem):
        self._problem = problem
        self._graph = RunGraph.build(problem)
        self._legal = problem.legal
        self._holders = [np.flatnonzero(row) for row in problem.legal]
        self._num_blocks = problem.num_blocks
        self._rate = problem.block_rate

    def random(self, size: int, rng: Rng) -> IntArray:
        """`[size, num_blocks]` random chains of runs of random lengths."""
        hosts = np.empty((size, self._num_blocks), dtype=np.intp)
        for row in hosts:
            at = 0
            while at < self._num_blocks:
                server = int(rng.choice(self._holders[at]))
                end = at + int(rng.integers(1, self._num_blocks - at + 1))
                at = self._fill(row, server, at, end)
        return hosts

    def cross(self, first: IntArray, second: IntArray, rng: Rng) -> tuple[IntArray, IntArray]:
        """Swap a random stretch of blocks between the rows of two populations."""
        cuts = np.sort(rng.integers(0, self._num_blocks + 1, size=(len(first), 2)), axis=1)
        block = np.arange(self._num_blocks)
        swap = (cuts[:, :1] <= block) & (block < cuts[:, 1:])
        return np.where(swap, second, first), np.where(swap, first, second)

    def mutate(self, hosts: IntArray, rng: Rng) -> IntArray:
        """Change every row by one of the private methods below."""
        changed = hosts.copy()
        kinds = (self._claim, self._move_boundary, self._drop_run, self._relieve, self._reroute)
        for row, kind in zip(changed, rng.integers(len(kinds), size=len(changed)), strict=True):
            kinds[kind](row, rng)
        return changed

    def repair(self, hosts: IntArray, rng: Rng) -> IntArray:
        """Replace hosts that do not hold their block by the neighbour's, or by any that does."""
        repaired = hosts.copy()
        legal = np.take_along_axis(self._legal, repaired.T, axis=1).T
        for row, block in zip(*np.nonzero(~legal), strict=True):
            before = repaired[row, block - 1] if block else -1
            if before >= 0 and self._legal[block, before]:
                repaired[row, block] = before
            else:
                repaired[row, block] = rng.choice(self._holders[block])
        return repaired

    def _claim(self, row: IntArray, rng: Rng) -> None:
        """A random holder of a random block takes a stretch around it."""
        block = int(rng.integers(self._num_blocks))
        server = int(rng.choice(self._holders[block]))
        reach = int(rng.integers(1, self._num_blocks + 1))
        self._fill(row, server, block, min(self._num_blocks, block + reach))
        self._fill_back(row, server, block, max(0, block - int(rng.integers(reach))))

    def _move_boundary(self, row: IntArray, rng: Rng) -> None:
        """One of two neighbouring runs takes up to four blocks from the other."""
        edges = np.flatnonzero(run_starts(row[None, :])[0])[1:]
        if not len(edges):
            self._claim(row, rng)
            return
        edge, step = int(rng.choice(edges)), int(rng.integers(1, 5))
        if rng.random() < 0.5:
            self._fill(row, int(row[edge - 1]), edge, min(self._num_blocks, edge + step))
        else:
            self._fill_back(row, int(row[edge]), edge, max(0, edge - step))

    def _drop_run(self, row: IntArray, rng: Rng) -> None:
        """The neighbours of a run take what they can of it."""
        starts = np.flatnonzero(run_starts(row[None, :])[0])
        which = int(rng.integers(len(starts)))
        start = int(starts[which])
        end = int(starts[which + 1]) if which + 1 < len(starts) else self._num_blocks
        middle = start
        if start > 0:
            middle = self._fill(row, int(row[start - 1]), start, end)
        if end < self._num_blocks:
            self._fill_back(row, int(row[end]), end, middle)

    def _relieve(self, row: IntArray, rng: Rng) -> None:
        """A server with capacity to spare takes over from the one that limits the throughput."""
        problem = self._problem
        starts = run_starts(row[None, :])[0]
        blocks = np.bincount(row, minlength=problem.num_servers)
        hops = np.bincount(row[starts], minlength=problem.num_servers)
        compute = problem.block_rate / np.maximum(blocks, 1)
        network = problem.hop_rate / np.maximum(hops, 1)
        stage = np.where(blocks > 0, np.minimum(compute, network), np.inf)
        slowest = int(stage.argmin())
        block = int(rng.choice(np.flatnonzero(row == slowest)))
        others = self._holders[block][self._holders[block] != slowest]
        if not len(others):
            return
        some = rng.choice(others, size=min(3, len(others)), replace=False)
        after = np.minimum(
            problem.block_rate[some] / (blocks[some] + 1), problem.hop_rate[some] / (hops[some] + 1)
        )
        taker, end = int(some[after.argmax()]), block + 1
        if network[slowest] < compute[slowest]:  # fewer visits help, shorter ones do not
            while block > 0 and row[block - 1] == slowest:
                block -= 1
            while end < self._num_blocks and row[end] == slowest:
                end += 1
        self._fill(row, taker, block, end)

    def _reroute(self, row: IntArray, rng: Rng) -> None:
        """The cheapest way through a stretch at about the throughput of the rest."""
        problem = self._problem
        start, end = np.sort(rng.choice(self._num_blocks + 1, size=2, replace=False)).tolist()
        rate = -float(evaluate(problem, row[None, :], 2)[0, 1]) * math.exp(rng.uniform(-0.1, 0.2))
        limits = Limits.at_rate(problem, rate)
        outside = np.concatenate([row[:start], row[end:]])
        blocks = limits.blocks - np.bincount(outside, minlength=problem.num_servers)
        limits = Limits(np.maximum(blocks, 0), limits.hops)
        part = between(problem, row.tolist(), start, end)
        noise = np.exp(rng.normal(0.0, _NOISE * rng.random(), size=(2, problem.num_servers)))
        block_ms, visit_ms = problem.decode_ms * noise[0], problem.hop_ms * noise[1]
        for _ in range(_TRIES):
            hosts = cheapest_runs(self._graph, limits, block_ms, visit_ms, part).hosts
            if not hosts:
                return
            blocks, hops = usage(hosts, problem.num_servers)
            over = (blocks > limits.blocks) | (hops > limits.hops)
            if not over.any():
                break
            visit_ms = visit_ms + np.where(over, _RAISE * rng.random(), 0.0) * problem.hop_ms
            block_ms = block_ms * np.where(over, 1 + _RAISE * rng.random(), 1.0)
        row[start:end] = hosts

    def _fill(self, row: IntArray, server: int, start: int, end: int) -> int:
        """Give `server` the blocks from `start` on while it holds them; returns where it
        stopped."""
        held = self._legal[start:end, server]
        stop = end if held.all() else start + int(held.argmin())
        row[start:stop] = server
        return stop

    def _fill_back(self, row: IntArray, server: int, end: int, start: int) -> None:
        """Give `server` the blocks before `end` back to `start` while it holds them."""
        held = self._legal[start:end, server][::-1]
        reach = end - start if held.all() else int(held.argmin())
        row[end - reach : end] = server
