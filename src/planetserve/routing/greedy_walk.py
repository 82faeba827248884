"""Chains built from left to right, one run at a time; shared by the simple optimisers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planetserve.routing.arrays import IntArray
from planetserve.routing.problem import RoutingProblem
from planetserve.types import Chain


def run_ends(problem: RoutingProblem) -> IntArray:
    """`[num_blocks, n]` where a run that is at the block must end at the latest."""
    ends = np.empty(problem.legal.shape, dtype=np.intp)
    end = np.full(problem.num_servers, problem.num_blocks)
    for block in range(problem.num_blocks - 1, -1, -1):
        end = np.where(problem.legal[block], end, block)
        ends[block] = end
    return ends


def walk(
    problem: RoutingProblem,
    choose: Callable[[int, int | None], int],
    run_end: Callable[[int, int], int],
) -> Chain:
    """The chain of the servers that `choose` names.

    Args:
        problem: where to walk.
        choose: returns the next server, given the next block and the server before (None: the
            client).
        run_end: returns the end of a run, given its first block and its server.
    """
    hosts: list[int] = []
    previous: int | None = None
    while len(hosts) < problem.num_blocks:
        server = choose(len(hosts), previous)
        hosts += [server] * (run_end(len(hosts), server) - len(hosts))
        previous = server
    return problem.chain(hosts)
