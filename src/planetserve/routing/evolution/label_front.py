"""The front of the chains that leave a server only at the end of its span, up to four objectives.

These chains are few enough to be searched exactly on swarms of some dozens of servers: a label is a
partial chain, and one is dropped when another that ends on the same server at the same boundary is
no worse in any objective. Greedy chains, random ones and those of Petals are among them, so a
search that starts with these chains covers all of theirs. On larger swarms labels are thinned out
to boxes of some percent (epsilon dominance; Laumanns et al., 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planetserve.routing.arrays import FloatArray, IntArray
from planetserve.routing.evolution.objectives import log_mistrust, prices
from planetserve.routing.front import undominated_rows
from planetserve.routing.greedy_walk import run_ends
from planetserve.routing.problem import RoutingProblem

_MAX_LABELS = 2000
"""Maximum labels at one boundary, and maximum chains in the result."""
_MAX_PRODUCT = 200_000
"""Maximum product of labels and servers, which bounds the time for large swarms."""
_LEAST = 8
_COMPARED = 5
"""Multiple of the labels to keep, up to which all are compared with each other; of more labels, one
per box is kept."""
_BOX = 0.005
"""Relative size of the first boxes; doubled until few enough labels remain."""


@dataclass(frozen=True, slots=True)
class _Labels:
    """Partial chains that end at one boundary."""

    server: IntArray
    """The last server; -1 for the client."""
    costs: FloatArray
    """`[labels, 4]` latency, negative throughput, mistrust, price."""
    from_block: IntArray
    from_label: IntArray

    def take(self, rows: IntArray) -> _Labels:
        return _Labels(
            self.server[rows], self.costs[rows], self.from_block[rows], self.from_label[rows]
        )


def walk_front(problem: RoutingProblem, num_objectives: int) -> list[tuple[int, ...]]:
    """The chains, as a host per block."""
    ends, prices_ = run_ends(problem), prices(problem)
    mistrust = log_mistrust(problem)
    most = max(_LEAST, min(_MAX_LABELS, _MAX_PRODUCT // problem.num_servers))
    num_blocks, k = problem.num_blocks, num_objectives
    waiting: list[list[_Labels]] = [[] for _ in range(num_blocks + 1)]
    settled: dict[int, _Labels] = {}
    zero = np.zeros(1, dtype=np.intp)
    waiting[0].append(_Labels(zero - 1, np.array([[0.0, -np.inf, 0.0, 0.0]]), zero, zero))
    for block in range(num_blocks):
        if not waiting[block]:
            continue
        labels = _settled(waiting[block], k, most)
        waiting[block], settled[block] = [], labels
        rows = np.arange(len(labels.server))
        for server in np.flatnonzero(problem.legal[block]):
            end = int(ends[block, server])
            length = end - block
            costs = labels.costs.copy()
            costs[:, 0] += np.where(
                labels.server < 0,
                problem.client_half_ms[server],
                problem.links.row(int(server))[labels.server],
            )
            costs[:, 0] += problem.hop_ms[server] + length * problem.decode_ms[server]
            rate = min(problem.block_rate[server] / length, problem.hop_rate[server])
            costs[:, 1] = np.maximum(costs[:, 1], -rate)
            costs[:, 2:] += mistrust[server], length * prices_[server]
            waiting[end].append(
                _Labels(np.full_like(rows, server), costs, np.full_like(rows, block), rows)
            )
    final = _joined(waiting[num_blocks])
    final.costs[:, 0] += problem.client_half_ms[final.server]
    best = final.take(_few(final.costs[:, :k], _MAX_LABELS))
    return [_trace(best, row, num_blocks, settled) for row in range(len(best.server))]


def _settled(parts: list[_Labels], num_objectives: int, most: int) -> _Labels:
    """The labels at a boundary that are extended further."""
    labels = _joined(parts)
    costs = labels.costs[:, :num_objectives]
    groups = [np.flatnonzero(labels.server == server) for server in np.unique(labels.server)]
    kept = [rows[_few(costs[rows], most)] for rows in groups]
    if sum(map(len, kept)) > most:
        kept = [rows[_few(costs[rows], max(_LEAST, most // len(groups)))] for rows in kept]
    return labels.take(np.concatenate(kept))


def _few(costs: FloatArray, most: int) -> IntArray:
    """Undominated rows, at most `most`; if there are more, one per box."""
    rows, box = np.arange(len(costs)), _BOX
    scaled = np.log(np.abs(costs) + 1e-9)
    if costs.shape[1] > 2:
        scaled[:, 2] = costs[:, 2]  # a logarithm already
    if len(rows) <= _COMPARED * most:
        rows = undominated_rows(costs)
    while len(rows) > most:
        _, first = np.unique(np.floor(scaled[rows] / box), axis=0, return_index=True)
        rows, box = rows[first], 2 * box
        if len(rows) <= _COMPARED * most:
            rows = rows[undominated_rows(costs[rows])]
    return rows


def _joined(parts: list[_Labels]) -> _Labels:
    return _Labels(
        np.concatenate([part.server for part in parts]),
        np.concatenate([part.costs for part in parts]),
        np.concatenate([part.from_block for part in parts]),
        np.concatenate([part.from_label for part in parts]),
    )


def _trace(labels: _Labels, row: int, at: int, settled: dict[int, _Labels]) -> tuple[int, ...]:
    hosts: list[int] = []
    while at > 0:
        start = int(labels.from_block[row])
        hosts += [int(labels.server[row])] * (at - start)
        at, row, labels = start, int(labels.from_label[row]), settled[start]
    return tuple(reversed(hosts))
