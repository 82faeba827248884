"""Exact search over the chains that the bounds leave: label setting with counted limits.

A label is a partial chain: the server whose run it ended at a boundary, its cost, and its counts of
the metered limits. It is dropped when its cost plus the bound on the rest passes the ceiling, or
when another label with the same server at the same boundary costs no more and has used no more of
anything metered. What is left is few, because the prices make the bound tight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planetserve.routing.exact.bounds import Bounds, Limits, RunGraph, Used
from planetserve.routing.exact.meter import Meter
from planetserve.routing.problem import BoolArray, IntArray
from planetserve.routing.snapshot import FloatArray

_PAIRWISE = 96
"""Up to this many labels, all pairs are compared at once; above, server by server."""


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search.

    When `complete`, a chain of cost at most the ceiling exists (keeping the metered limits) only if
    `hosts` is one, and then none is cheaper.
    """

    hosts: tuple[int, ...] | None
    labels: int
    complete: bool


@dataclass(slots=True)
class _Labels:
    """Partial chains at one boundary, as columns."""

    server: IntArray
    cost: FloatArray
    used: Used
    from_block: IntArray
    from_label: IntArray

    def take(self, rows: IntArray) -> _Labels:
        return _Labels(
            self.server[rows],
            self.cost[rows],
            self.used[rows],
            self.from_block[rows],
            self.from_label[rows],
        )


class LabelSearch:
    """One search; `run` may be called once.

    Args:
        ceiling: chains that cost more, in milliseconds without prices, are not looked for.
        max_labels: give up after this many.
    """

    def __init__(
        self,
        graph: RunGraph,
        limits: Limits,
        meter: Meter,
        bounds: Bounds,
        ceiling: float,
        max_labels: int,
    ):
        self._graph = graph
        self._limits = limits
        self._meter = meter
        self._bounds = bounds
        # A feasible chain's priced cost is at most its cost plus the price of using every limit up.
        self._ceiling = ceiling + float(meter.price @ meter.limit)
        self._max_labels = max_labels
        num_blocks = len(graph.holders)
        self._waiting: list[list[_Labels]] = [[] for _ in range(num_blocks + 1)]
        self._settled: list[_Labels | None] = [None] * (num_blocks + 1)
        self._count = 0

    def run(self) -> Found:
        """Search all boundaries in order."""
        num_blocks = len(self._graph.holders)
        for block in range(num_blocks):
            entered = self._enter_first() if block == 0 else self._settle_and_enter(block)
            if entered is not None:
                self._run_ahead(block, entered)
            if self._count > self._max_labels:
                return Found(None, self._count, complete=False)
        if not self._waiting[num_blocks]:
            return Found(None, self._count, complete=True)
        final = _concatenate(self._waiting[num_blocks])
        cost = final.cost + self._graph.problem.client_half_ms[final.server]
        hosts = self._trace(final, int(cost.argmin()))
        return Found(hosts, self._count, complete=True)

    def _enter_first(self) -> _Labels | None:
        """Runs that start at block 0: `cost` includes the visit, `used` counts it."""
        here = self._graph.holders[0]
        here = here[self._limits.blocks[here] > 0]
        keep = self._graph.problem.client_half_ms[here] + self._bounds.enter[0, here]
        here = here[keep <= self._ceiling]
        if not len(here):
            return None
        zeros = np.zeros(len(here), dtype=np.intp)
        used = np.zeros((len(here), len(self._meter.limit)), dtype=np.int16)
        self._meter.charge_visit(used, here)
        problem = self._graph.problem
        cost = problem.client_half_ms[here] + problem.hop_ms[here]
        return _Labels(here, cost, used, zeros, zeros)

    def _settle_and_enter(self, block: int) -> _Labels | None:
        """Runs that start at `block`, each from the label in `from_label` that ended there."""
        if not self._waiting[block]:
            return None
        ended = _concatenate(self._waiting[block])
        self._waiting[block] = []
        ended = _undominated(ended)
        self._settled[block] = ended
        self._count += len(ended.cost)
        graph, problem = self._graph, self._graph.problem
        here = graph.holders[block]
        rows = np.searchsorted(graph.holders[block - 1], ended.server)
        arrive = ended.cost[:, None] + graph.links[block][rows]
        priced = arrive + self._bounds.enter[block, here]
        priced += (ended.used @ self._meter.price)[:, None]
        allowed = (priced <= self._ceiling) & self._meter.may_enter(ended.used, here)
        label, column = np.nonzero(allowed)
        if not len(label):
            return None
        server, used = here[column], ended.used[label]
        self._meter.charge_visit(used, server)
        cost = arrive[label, column] + problem.hop_ms[server]
        entered = _Labels(server, cost, used, np.full(len(label), block), label)
        return _undominated(entered)

    def _run_ahead(self, block: int, entered: _Labels) -> None:
        """Let every run end at each boundary it can reach, and wait there."""
        graph, server = self._graph, entered.server
        left = self._meter.blocks_left(entered.used, server, self._limits)
        last = np.minimum(graph.run_end[block, server] - block, left)
        steps = np.arange(1, int(last.max()) + 1)
        cost = entered.cost + steps[:, None] * graph.problem.decode_ms[server]
        priced = cost + self._bounds.leave[block + 1 : block + 1 + len(steps), server]
        priced += entered.used @ self._meter.price
        priced += steps[:, None] * self._price_of_block(server)
        step, row = np.nonzero((priced <= self._ceiling) & (steps[:, None] <= last))
        used = entered.used[row]
        self._meter.charge_blocks(used, server[row], (step + 1).astype(np.int16))
        ended = _Labels(
            server[row], cost[step, row], used, np.full(len(row), block), entered.from_label[row]
        )
        cuts = np.searchsorted(step, np.arange(len(steps) + 1))
        for i in range(len(steps)):
            if cuts[i] < cuts[i + 1]:
                self._waiting[block + 1 + i].append(ended.take(np.arange(cuts[i], cuts[i + 1])))

    def _price_of_block(self, server: IntArray) -> FloatArray:
        slots = self._meter.block_slot[server]
        price = np.append(self._meter.price, 0.0)  # slot -1 reads the appended zero
        return price[slots]

    def _trace(self, labels: _Labels, row: int) -> tuple[int, ...]:
        hosts: list[int] = []
        at = len(self._graph.holders)
        while True:
            start = int(labels.from_block[row])
            hosts += [int(labels.server[row])] * (at - start)
            previous = self._settled[start]
            if start == 0 or previous is None:
                return tuple(reversed(hosts))
            at, row, labels = start, int(labels.from_label[row]), previous


def _concatenate(parts: list[_Labels]) -> _Labels:
    if len(parts) == 1:
        return parts[0]
    return _Labels(
        np.concatenate([part.server for part in parts]),
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.used for part in parts]),
        np.concatenate([part.from_block for part in parts]),
        np.concatenate([part.from_label for part in parts]),
    )


def _undominated(labels: _Labels) -> _Labels:
    """Without the labels that another one of the same server beats or equals in everything."""
    labels = labels.take(np.lexsort((labels.cost, labels.server)))
    server, used = labels.server, labels.used
    if used.shape[1] == 0:
        return labels.take(np.flatnonzero(np.append(True, server[1:] != server[:-1])))
    if len(server) <= _PAIRWISE:
        return labels.take(np.flatnonzero(~_beaten(server, used)))
    edges = np.flatnonzero(np.append(True, server[1:] != server[:-1]))
    beaten = np.zeros(len(server), dtype=bool)
    for start, end in zip(edges, np.append(edges[1:], len(server)), strict=True):
        if end - start > 1:
            beaten[start:end] = _beaten_in_chunks(used[start:end])
    return labels.take(np.flatnonzero(~beaten))


def _beaten(server: IntArray, used: Used) -> BoolArray:
    """Rows beaten by an earlier, so no dearer, row of the same server."""
    no_more = (used[:, None, :] <= used[None, :, :]).all(axis=2)
    no_more &= server[:, None] == server[None, :]
    beaten: BoolArray = np.triu(no_more, 1).any(axis=0)
    return beaten


def _beaten_in_chunks(used: Used, chunk: int = 256) -> BoolArray:
    """Rows of one server beaten by an earlier row, comparing a bounded number of pairs at once."""
    beaten = np.zeros(len(used), dtype=bool)
    for start in range(0, len(used), chunk):
        rows = used[start : start + chunk]
        same = np.zeros(len(rows), dtype=np.intp)
        beaten[start : start + chunk] = _beaten(same, rows)
        kept = used[:start][~beaten[:start]]
        for low in range(0, len(kept), chunk):
            part = kept[low : low + chunk]
            beaten[start : start + chunk] |= (
                (part[:, None, :] <= rows[None, :, :]).all(axis=2).any(axis=0)
            )
    return beaten
