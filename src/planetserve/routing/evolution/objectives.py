"""What a population costs: up to four objectives at once, all minimised, all vectorised."""

from __future__ import annotations

import numpy as np

from planetserve.routing.arrays import BoolArray, FloatArray, IntArray
from planetserve.routing.problem import RoutingProblem

"""In the order of the columns; a mode of `k` objectives uses the first `k`."""


def evaluate(problem: RoutingProblem, hosts: IntArray, num_objectives: int) -> FloatArray:
    """`[individuals, num_objectives]` for `hosts[individuals, num_blocks]`.

    Latency in milliseconds, throughput in tokens per second with its sign turned, reputation as the
    sum of -log over the servers used, price of one token.
    """
    size, n = len(hosts), problem.num_servers
    starts = run_starts(hosts)
    rows = np.arange(size)[:, None] * n
    blocks = np.bincount((rows + hosts).ravel(), minlength=size * n).reshape(size, n)
    columns = [_latency(problem, hosts, starts)]
    if num_objectives > 1:
        columns.append(-_throughput(problem, hosts, starts, blocks))
    if num_objectives > 2:
        columns.append((blocks > 0) @ log_mistrust(problem))
    if num_objectives > 3:
        columns.append(blocks @ prices(problem))
    return np.stack(columns, axis=1)


def run_starts(hosts: IntArray) -> BoolArray:
    """Where a hop begins: `[individuals, num_blocks]`."""
    starts = np.ones(hosts.shape, dtype=bool)
    starts[:, 1:] = hosts[:, 1:] != hosts[:, :-1]
    return starts


def log_mistrust(problem: RoutingProblem) -> FloatArray:
    """`[n]` -log of each server's reputation, which adds up where reputations multiply."""
    reputation = np.array([problem.snapshot.servers[i].reputation for i in problem.members])
    mistrust: FloatArray = -np.log(np.clip(reputation, 1e-9, 1.0))
    return mistrust


def prices(problem: RoutingProblem) -> FloatArray:
    """`[n]` price of one token through one block."""
    return np.array([problem.snapshot.servers[i].price for i in problem.members])


def _latency(problem: RoutingProblem, hosts: IntArray, starts: BoolArray) -> FloatArray:
    ends = problem.client_half_ms[hosts[:, 0]] + problem.client_half_ms[hosts[:, -1]]
    links = problem.links.pairs(hosts[:, :-1], hosts[:, 1:]).sum(axis=1)
    blocks = problem.decode_ms[hosts].sum(axis=1)
    visits = (problem.hop_ms[hosts] * starts).sum(axis=1)
    latency: FloatArray = ends + links + blocks + visits
    return latency


def _throughput(
    problem: RoutingProblem, hosts: IntArray, starts: BoolArray, blocks: IntArray
) -> FloatArray:
    size, n = blocks.shape
    rows = np.arange(size)[:, None] * n
    hops = np.bincount((rows + hosts)[starts], minlength=size * n).reshape(size, n)
    used = np.maximum(blocks, 1)
    stage = np.minimum(problem.block_rate / used, problem.hop_rate / np.maximum(hops, 1))
    slowest: FloatArray = np.where(blocks > 0, stage, np.inf).min(axis=1)
    return slowest
