"""Lower bounds: the cheapest way on from every block boundary when only single runs are limited.

The backward dynamic programme works on runs, not blocks: `enter[b, s]` is the least cost of
finishing the chain when server `s` starts a run at boundary `b`, and `leave[b, s]` when it has just
ended one there. A later visit to the same server is not charged against its limit, so both are
lower bounds; prices per block and per visit (see `lagrangian.py`) tighten them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planetserve.errors import ConfigError
from planetserve.routing.arrays import BoolArray, FloatArray, IntArray
from planetserve.routing.greedy_walk import run_ends
from planetserve.routing.problem import RoutingProblem

Counts = NDArray[np.int64]
_MAX_CELLS = 10**8
"""Maximum number of links of all boundaries, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of each server one chain may use; 0 where it may not be used at all."""

    blocks: Counts
    hops: Counts

    @classmethod
    def at_rate(cls, problem: RoutingProblem, rate: float) -> Limits:
        """What a throughput of at least `rate` tokens per second allows."""
        most = problem.num_blocks
        blocks = np.minimum(problem.block_rate / rate, most).astype(np.int64)
        hops = np.minimum(problem.hop_rate / rate, most).astype(np.int64)
        usable = (blocks > 0) & (hops > 0)
        return cls(np.where(usable, blocks, 0), np.where(usable, np.minimum(hops, blocks), 0))

    def broken(self, blocks: Counts, hops: Counts) -> tuple[IntArray, IntArray]:
        """Servers that run more blocks, and servers that are visited more often, than allowed."""
        return np.flatnonzero(blocks > self.blocks), np.flatnonzero(hops > self.hops)


@dataclass(frozen=True, slots=True)
class RunGraph:
    """The data shared by all bounds on one problem."""

    problem: RoutingProblem
    holders: tuple[IntArray, ...]
    """`[num_blocks]` the servers that may run each block."""
    links: tuple[FloatArray, ...]
    """`[num_blocks]` half RTTs `[holders of b - 1, holders of b]`; infinite to the same server.
    The first entry holds the client's links, `[1, holders of 0]`."""
    run_end: IntArray
    """`[num_blocks, n]` where a run that is at the block must end at the latest."""
    beyond: tuple[BoolArray | None, ...]
    """`[num_blocks]` whether a run from each block cannot be so long, `[lengths from 1, holders]`;
    None where its holders have no gap later on, so that nobody can end a run it could not make."""

    @classmethod
    def build(cls, problem: RoutingProblem) -> RunGraph:
        """The graph with all links.

        Raises:
            ConfigError: they would take gigabytes.
        """
        holders = tuple(np.flatnonzero(row) for row in problem.legal)
        cells = sum(len(before) * len(here) for before, here in pairwise(holders))
        if cells > _MAX_CELLS:
            raise ConfigError(
                f"{problem.num_servers} servers with spans this long are too many for a front of "
                "chains; use shortest_path, or allow fewer servers"
            )
        links = [problem.client_half_ms[None, holders[0]]]
        for before, here in pairwise(holders):
            between = problem.links.block(before, here)
            between[before[:, None] == here[None, :]] = np.inf
            links.append(between)
        ends = run_ends(problem)
        return cls(problem, holders, tuple(links), ends, _beyond(problem, ends, holders))


def _beyond(
    problem: RoutingProblem, run_end: IntArray, holders: Sequence[IntArray]
) -> tuple[BoolArray | None, ...]:
    num_blocks = problem.num_blocks
    last = num_blocks - problem.legal[::-1].argmax(axis=0)
    beyond: list[BoolArray | None] = []
    for block, here in enumerate(holders):
        ends = run_end[block, here]
        after = np.arange(block + 1, num_blocks + 1)[:, None]
        beyond.append(after > ends if (ends < last[here]).any() else None)
    return tuple(beyond)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least cost to finish from anywhere, in milliseconds, prices included."""

    enter: FloatArray
    """`[num_blocks, n]` when the server starts a run at the boundary, the visit included."""
    leave: FloatArray
    """`[num_blocks + 1, n]` when the server has ended a run at the boundary."""
    total: float
    """Cost of the whole chain, or of the requested part; infinite when there is none."""
    hosts: tuple[int, ...]
    """The chain that has this cost, as a host per block; empty when there is none."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part `[start, end)` of a chain, and what it costs to come to it and to go on from it."""

    start: int
    end: int
    arrive: FloatArray
    """`[n]` link into a first run on each server."""
    leave: FloatArray
    """`[n]` link out of a last run on each server."""


def whole_chain(problem: RoutingProblem) -> Stretch:
    """All blocks, from the client and back to it."""
    return Stretch(0, problem.num_blocks, problem.client_half_ms, problem.client_half_ms)


def between(problem: RoutingProblem, hosts: Sequence[int], start: int, end: int) -> Stretch:
    """The part `[start, end)` of a chain given as a host per block, the rest as it is.

    Going on with the server next to the part is no visit of its own: the link to it gives back what
    the visit costs.
    """

    def link(block: int) -> FloatArray:
        if not 0 <= block < len(hosts):
            return problem.client_half_ms
        links = problem.links.row(hosts[block])
        links[hosts[block]] = -problem.hop_ms[hosts[block]]
        return links

    return Stretch(start, end, link(start - 1), link(end))


def lower_bounds(
    graph: RunGraph, limits: Limits, block_price: FloatArray, hop_price: FloatArray
) -> Bounds:
    """Bounds under `limits` on single runs, with `[n]` prices added per block and per visit."""
    problem = graph.problem
    block_ms, visit_ms = problem.decode_ms + block_price, problem.hop_ms + hop_price
    return cheapest_runs(graph, limits, block_ms, visit_ms, whole_chain(problem))


def cheapest_runs(
    graph: RunGraph, limits: Limits, block_ms: FloatArray, visit_ms: FloatArray, part: Stretch
) -> Bounds:
    """The least cost of running the blocks of `part`, each single run within `limits`.

    Args:
        block_ms, visit_ms: `[n]` what a block and a visit cost.
    """
    n, start, end = graph.problem.num_servers, part.start, part.end
    enter = np.full((end, n), np.inf)
    leave = np.full((end + 1, n), np.inf)
    leave[end] = np.where(graph.problem.legal[end - 1], part.leave, np.inf)
    # Time counted from block 0 turns "k blocks, then leave" into one addition per boundary.
    offset = np.arange(end + 1)[:, None] * block_ms
    shifted = leave + offset
    enter_ms = visit_ms - offset
    longest = int(limits.blocks.max(initial=0))
    too_long = np.arange(1, longest + 1)[:, None] > limits.blocks
    for block in range(end - 1, start - 1, -1):
        here = graph.holders[block]
        window = shifted[block + 1 : block + 1 + longest, here]
        if not len(window):
            continue
        window[too_long[: len(window), here]] = np.inf
        beyond = graph.beyond[block]
        if beyond is not None:
            window[beyond[: len(window)]] = np.inf
        ahead = window.min(axis=0)
        ahead += enter_ms[block, here]
        enter[block, here] = ahead
        if block > start:
            before = graph.holders[block - 1]
            onward = (graph.links[block] + ahead).min(axis=1)
            leave[block, before] = onward
            onward += offset[block, before]
            shifted[block, before] = onward
    first = int((part.arrive + enter[start]).argmin())
    total = float(part.arrive[first] + enter[start, first])
    hosts: tuple[int, ...] = ()
    if np.isfinite(total):
        hosts = _trace(graph, limits, shifted, enter, start, first)
    return Bounds(enter, leave, total, hosts)


def _trace(
    graph: RunGraph,
    limits: Limits,
    shifted: FloatArray,
    enter: FloatArray,
    start: int,
    first: int,
) -> tuple[int, ...]:
    hosts: list[int] = []
    server, at, end = first, start, len(enter)
    while True:
        last = min(int(graph.run_end[at, server]), at + int(limits.blocks[server]), end)
        stop = at + 1 + int(shifted[at + 1 : last + 1, server].argmin())
        hosts += [server] * (stop - at)
        if stop == end:
            return tuple(hosts)
        here = graph.holders[stop]
        row = int(np.searchsorted(graph.holders[stop - 1], server))
        server = int(here[(graph.links[stop][row] + enter[stop, here]).argmin()])
        at = stop


def usage(hosts: Sequence[int], n: int) -> tuple[Counts, Counts]:
    """Blocks and visits of each server in a chain given as a host per block."""
    array = np.asarray(hosts, dtype=np.intp)
    starts = np.ones(len(array), dtype=bool)
    starts[1:] = array[1:] != array[:-1]
    return np.bincount(array, minlength=n), np.bincount(array[starts], minlength=n)
