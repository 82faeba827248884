"""Exact search over the chains that the bounds do not exclude: label setting with counted limits.

A label is a partial chain: the server whose run it ended at a boundary, its cost, and its counts of
the counted limits. It is dropped when its cost plus the bound on the rest passes the ceiling, or
when another label with the same server at the same boundary costs no more and has used no more of
any counted limit. Few labels are left, because the prices make the bound tight. Where it is not
tight, a beam search follows the most promising labels only (Lowerre, 1976).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planetserve.routing.arrays import BoolArray, FloatArray, IntArray
from planetserve.routing.exact.lagrangian import Priced
from planetserve.routing.exact.packed_counts import PackedCounts, Used
from planetserve.routing.run_graph import Limits, RunGraph, Stretch, whole_chain

_PAIRWISE = 96
"""Maximum labels of which all pairs are compared at once; more are compared server by server."""
_LABELS_PER_BLOCK = 20
"""Effort, in labels, of what is done once at every boundary."""
_SERVERS_PER_LABEL = 16
"""Number of servers to enter next that take as long as one label."""
_EARLIER: BoolArray = np.tri(256, k=-1, dtype=bool).T
_PAIRS_PER_LABEL = 1000
"""Number of comparisons of two labels that take as long as making one."""


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search.

    When `complete`, a chain of cost at most the ceiling exists (keeping the metered limits) only if
    `hosts` is one, and then none is cheaper.
    """

    hosts: tuple[int, ...] | None
    effort: int
    """Labels made, and comparisons counted as labels that take as long."""
    complete: bool


@dataclass(slots=True)
class _Labels:
    """Partial chains at one boundary, as columns."""

    server: IntArray
    cost: FloatArray
    paid: FloatArray
    """The prices of what is used."""
    used: Used
    from_block: IntArray
    from_label: IntArray

    def take(self, rows: IntArray) -> _Labels:
        return _Labels(
            self.server[rows],
            self.cost[rows],
            self.paid[rows],
            self.used[rows],
            self.from_block[rows],
            self.from_label[rows],
        )


class LabelSearch:
    """One search; `run` may be called once.

    Args:
        priced: prices, and the bounds on the remaining cost at these prices.
        packed counts: what is counted; everything that has a price is.
        ceiling: chains that cost more, in milliseconds without prices, are not looked for.
        max_effort: give up after this much.
        beam: maximum labels to keep at a boundary, the most promising ones. The chain found then
            keeps the counted limits, but nothing is proven.
        part: the part of a chain to search; the whole chain by default.
    """

    def __init__(
        self,
        graph: RunGraph,
        limits: Limits,
        packed_counts: PackedCounts,
        priced: Priced,
        ceiling: float,
        max_effort: float = math.inf,
        beam: int | None = None,
        part: Stretch | None = None,
    ):
        self._graph = graph
        self._limits = limits
        self._meter = packed_counts
        self._priced = priced
        self._bounds = priced.bounds
        # A feasible chain's priced cost is at most its cost plus the price of using every limit up.
        self._ceiling = ceiling + priced.price_of(limits)
        self._max_effort = max_effort
        self._beam = beam
        self._part = part or whole_chain(graph.problem)
        self._waiting: dict[int, list[_Labels]] = {
            block: [] for block in range(self._part.start, self._part.end + 1)
        }
        self._settled: dict[int, _Labels] = {}
        self._effort = 0

    def run(self) -> Found:
        """Search all boundaries in order."""
        part = self._part
        for block in range(part.start, part.end):
            entered = self._enter_first() if block == part.start else self._settle_and_enter(block)
            if entered is not None:
                self._run_ahead(block, entered)
            self._effort += _LABELS_PER_BLOCK
            if self._effort > self._max_effort:
                return Found(None, self._effort, complete=False)
        complete = self._beam is None
        if not self._waiting[part.end]:
            return Found(None, self._effort, complete)
        final = _concatenate(self._waiting[part.end])
        cost = final.cost + part.leave[final.server]
        return Found(self._trace(final, int(cost.argmin())), self._effort, complete)

    def _enter_first(self) -> _Labels | None:
        """Runs that start with the part: `cost` includes the visit, `used` counts it."""
        start, arrive = self._part.start, self._part.arrive
        here = self._graph.holders[start]
        here = here[self._limits.blocks[here] > 0]
        here = here[arrive[here] + self._bounds.enter[start, here] <= self._ceiling]
        if not len(here):
            return None
        first = np.full(len(here), start)
        used = self._meter.unused(len(here))
        self._meter.charge_visit(used, here)
        cost = arrive[here] + self._graph.problem.hop_ms[here]
        return _Labels(here, cost, self._priced.hop_price[here], used, first, first)

    def _settle_and_enter(self, block: int) -> _Labels | None:
        """Runs that start at `block`, each from the label in `from_label` that ended there."""
        if not self._waiting[block]:
            return None
        ended = _concatenate(self._waiting[block])
        self._waiting[block] = []
        if self._beam is not None:
            ended = self._most_promising(ended, block, 4 * self._beam)
        ended = self._undominated(ended)
        if self._beam is not None:
            ended = self._most_promising(ended, block, self._beam)
        self._settled[block] = ended
        graph, problem = self._graph, self._graph.problem
        here = graph.holders[block]
        made = len(ended.cost) * (1 + len(here) // _SERVERS_PER_LABEL)
        self._effort += made if self._beam is None else made // 2  # few are compared
        if self._effort > self._max_effort:
            return None
        rows = np.searchsorted(graph.holders[block - 1], ended.server)
        arrive = ended.cost[:, None] + graph.links[block][rows]
        priced = arrive + ended.paid[:, None] + self._bounds.enter[block, here]
        allowed = (priced <= self._ceiling) & self._meter.may_enter(ended.used, here)
        label, column = np.nonzero(allowed)
        if not len(label):
            return None
        most = len(label) if self._beam is None else 4 * self._beam
        if len(label) > most:
            kept = np.argpartition(priced[label, column], most)[:most]
            label, column = label[kept], column[kept]
        server, used = here[column], ended.used[label]
        self._meter.charge_visit(used, server)
        cost = arrive[label, column] + problem.hop_ms[server]
        paid = ended.paid[label] + self._priced.hop_price[server]
        entered = _Labels(server, cost, paid, used, np.full(len(label), block), label)
        return self._undominated(entered)

    def _most_promising(self, ended: _Labels, block: int, most: int) -> _Labels:
        if len(ended.cost) <= most:
            return ended
        total = ended.cost + ended.paid + self._bounds.leave[block, ended.server]
        return ended.take(np.argpartition(total, most)[:most])

    def _run_ahead(self, block: int, entered: _Labels) -> None:
        """Let every run end at each boundary it can reach, and wait there."""
        graph, server = self._graph, entered.server
        left = self._meter.blocks_left(entered.used, server, self._limits)
        last = np.minimum(np.minimum(graph.run_end[block, server], self._part.end) - block, left)
        steps = np.arange(1, int(last.max()) + 1)
        cost = entered.cost + steps[:, None] * graph.problem.decode_ms[server]
        paid = entered.paid + steps[:, None] * self._priced.block_price[server]
        priced = cost + paid + self._bounds.leave[block + 1 : block + 1 + len(steps), server]
        step, row = np.nonzero((priced <= self._ceiling) & (steps[:, None] <= last))
        used = entered.used[row]
        self._meter.charge_blocks(used, server[row], step + 1)
        ended = _Labels(
            server[row],
            cost[step, row],
            paid[step, row],
            used,
            np.full(len(row), block),
            entered.from_label[row],
        )
        cuts = np.searchsorted(step, np.arange(len(steps) + 1))
        for i in range(len(steps)):
            if cuts[i] < cuts[i + 1]:
                self._waiting[block + 1 + i].append(ended.take(np.arange(cuts[i], cuts[i + 1])))

    def _trace(self, labels: _Labels, row: int) -> tuple[int, ...]:
        hosts: list[int] = []
        at = self._part.end
        while True:
            start = int(labels.from_block[row])
            hosts += [int(labels.server[row])] * (at - start)
            if start == self._part.start:
                return tuple(reversed(hosts))
            at, row, labels = start, int(labels.from_label[row]), self._settled[start]

    def _undominated(self, labels: _Labels) -> _Labels:
        """Without the labels that another of the same server beats or equals in everything."""
        if self._beam is not None:
            return self._cheapest_of_like(labels)
        labels = labels.take(np.lexsort((labels.cost, labels.server)))
        server, used = labels.server, labels.used
        starts = np.flatnonzero(np.append(True, server[1:] != server[:-1]))
        if used.shape[1] == 0:
            return labels.take(starts)
        if len(server) <= _PAIRWISE:
            return labels.take(np.flatnonzero(~self._beaten(used, server)))
        beaten = np.zeros(len(server), dtype=bool)
        for start, end in zip(starts, np.append(starts[1:], len(server)), strict=True):
            if end - start > 1:
                beaten[start:end] = self._beaten_in_chunks(used[start:end])
        return labels.take(np.flatnonzero(~beaten))

    def _cheapest_of_like(self, labels: _Labels) -> _Labels:
        """Without the labels that another of the same server and the same counts beats."""
        keys = np.column_stack([labels.server.astype(np.uint64), labels.used])
        order = np.lexsort((labels.cost, *keys.T))
        keys = keys[order]
        return labels.take(order[np.append(True, (keys[1:] != keys[:-1]).any(axis=1))])

    def _beaten(self, used: Used, server: IntArray | None = None) -> BoolArray:
        """Rows beaten by an earlier, so no dearer, row of the same server."""
        no_more = self._no_more(used, used)
        no_more &= _EARLIER[: len(used), : len(used)]
        if server is not None:
            no_more &= server[:, None] == server[None, :]
        beaten: BoolArray = np.any(no_more, axis=0)
        return beaten

    def _beaten_in_chunks(self, used: Used, chunk: int = len(_EARLIER)) -> BoolArray:
        """Rows of one server beaten by an earlier one, a bounded number of pairs at a time."""
        beaten = np.zeros(len(used), dtype=bool)
        for start in range(0, len(used), chunk):
            rows = np.arange(start, min(start + chunk, len(used)))
            kept = used[:start][~beaten[:start]]
            for low in range(0, len(kept), chunk):
                worse = np.any(self._no_more(kept[low : low + chunk], used[rows]), axis=0)
                beaten[rows[worse]] = True
                rows = rows[~worse]
            beaten[rows] = self._beaten(used[rows])
        return beaten

    def _no_more(self, one: Used, other: Used) -> BoolArray:
        self._effort += len(one) * len(other) * len(self._meter.guard) // _PAIRS_PER_LABEL
        return self._meter.no_more(one, other)


def beam_effort(graph: RunGraph) -> float:
    """Effort of a beam search through all blocks for each label that it keeps at a boundary."""
    return sum(1 + len(here) // _SERVERS_PER_LABEL for here in graph.holders) / 2


def _concatenate(parts: list[_Labels]) -> _Labels:
    if len(parts) == 1:
        return parts[0]
    return _Labels(
        np.concatenate([part.server for part in parts]),
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.paid for part in parts]),
        np.concatenate([part.used for part in parts]),
        np.concatenate([part.from_block for part in parts]),
        np.concatenate([part.from_label for part in parts]),
    )
