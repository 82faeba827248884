"""Half round-trip times between the servers of a problem, as the planning methods read them.

Small swarms, and those that know most of their pairs, have a table of all pairs. In a large swarm
few pairs are known, some dozens per server, and all other pairs have the default. Only the known
pairs are kept: a table of 10,000 servers would take 800 MB.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planetserve.routing.arrays import FloatArray, IntArray


class Links(Protocol):
    """Between `n` servers; between a server and itself the time is 0."""

    def row(self, server: int) -> FloatArray:
        """`[n]` from one server to all, as an array of the caller's own."""
        ...

    def block(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """`[rows, columns]` between some servers and others."""
        ...

    def pairs(self, one: IntArray, other: IntArray) -> FloatArray:
        """Between `one[i]` and `other[i]`; the two broadcast."""
        ...

    def cheapest(self, cost: FloatArray, to: IntArray, scale: FloatArray) -> FloatArray:
        """`[to]` the least of `cost[t]` and the link from `t`, times `scale`, over all servers `t`.

        Args:
            cost: `[n]`, infinite for servers that cannot be the previous one.
            to: the next servers.
            scale: `[n]` factors on the links to each server.
        """
        ...


class LinkTable:
    """All pairs.

    Args:
        half_ms: `[n, n]`, symmetric, 0 on its diagonal; kept, not copied.
    """

    def __init__(self, half_ms: FloatArray):
        self._table = half_ms

    def row(self, server: int) -> FloatArray:
        times: FloatArray = self._table[server].copy()
        return times

    def block(self, rows: IntArray, columns: IntArray) -> FloatArray:
        between: FloatArray = self._table[np.ix_(rows, columns)]
        return between

    def pairs(self, one: IntArray, other: IntArray) -> FloatArray:
        times: FloatArray = self._table[one, other]
        return times

    def cheapest(self, cost: FloatArray, to: IntArray, scale: FloatArray) -> FloatArray:
        came = np.flatnonzero(np.isfinite(cost))
        everybody = len(to) == len(came) == len(cost)
        table = self._table if everybody else self._table[np.ix_(to, came)]
        total = table * scale[to, None]
        total += cost[came]
        least: FloatArray = total.min(axis=1, initial=np.inf)
        return least


class KnownLinks:
    """The pairs that are known, sorted by one server and then by the other, in both directions."""

    def __init__(
        self, n: int, first: IntArray, second: IntArray, half_ms: FloatArray, default: float
    ):
        self._n = n
        self._default = default
        keys = np.concatenate([first * n + second, second * n + first])
        self._keys, order = np.unique(keys, return_index=True)
        self._half_ms = np.concatenate([half_ms, half_ms])[order]
        self._one, self._other = np.divmod(self._keys, n)
        self._starts = np.searchsorted(self._one, np.arange(n + 1))
        self._slow = self._keys[self._half_ms > default]

    def row(self, server: int) -> FloatArray:
        times = np.full(self._n, self._default)
        known = slice(self._starts[server], self._starts[server + 1])
        times[self._other[known]] = self._half_ms[known]
        times[server] = 0.0
        return times

    def block(self, rows: IntArray, columns: IntArray) -> FloatArray:
        return self.pairs(rows[:, None], columns[None, :])

    def pairs(self, one: IntArray, other: IntArray) -> FloatArray:
        keys = one * self._n + other
        at, known = _find(self._keys, keys)
        times = np.full(keys.shape, self._default)
        times[known] = self._half_ms[at[known]]
        times[np.broadcast_to(one == other, keys.shape)] = 0.0
        return times

    def cheapest(self, cost: FloatArray, to: IntArray, scale: FloatArray) -> FloatArray:
        least = self._by_default(cost, scale)
        through = cost[self._other] + self._half_ms * scale[self._one]
        some = np.flatnonzero(np.diff(self._starts))
        if len(some):
            known = np.minimum.reduceat(through, self._starts[some])
            least[some] = np.minimum(least[some], known)
        return least[to]

    def _by_default(self, cost: FloatArray, scale: FloatArray) -> FloatArray:
        """`[n]` over links of the default time.

        A server that is known to be nearer may be counted as one of them: `cheapest` finds it
        cheaper. One that is known to be farther may not.
        """
        order = np.argsort(cost)
        rank = np.zeros(self._n, dtype=np.intp)
        pending = np.arange(self._n)
        while len(pending):
            _, slow = _find(self._slow, pending * self._n + order[rank[pending]])
            pending = pending[slow]
            rank[pending] += 1
            pending = pending[rank[pending] < self._n]
        found = rank < self._n
        nearest = cost[order[np.minimum(rank, self._n - 1)]]
        return np.where(found, nearest + self._default * scale, np.inf)


def _find(keys: IntArray, wanted: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """Where `wanted` would stand in the sorted `keys`, and which of them do."""
    at = np.searchsorted(keys, wanted)
    if not len(keys):
        return at, np.zeros(wanted.shape, dtype=bool)
    return at, keys[np.minimum(at, len(keys) - 1)] == wanted
