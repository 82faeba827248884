"""The exact chain of least latency.

A dynamic programme over blocks. `best[b][s]` is the least time of a partial ring that has run
blocks `[0, b]`, the last of them on server `s`. The next block runs on the same server, or on
another one after half a round trip and a visit. Servers may be entered and left anywhere inside
their spans and visited again, so this is the whole space of chains: `num_blocks` steps of
`servers ** 2`. RTTs need not obey the triangle inequality.

With many clients that chain is not the best choice. The announced load of servers is some seconds
old, and a session runs for a minute: all clients that plan now would go to the server that looks
idle now. `cost_jitter` and `load_prior` correct for this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets

import numpy as np

from planetserve.config.old_names import SHORTEST_PATH, accepts_old_names
from planetserve.errors import ConfigError
from planetserve.routing.arrays import FloatArray
from planetserve.routing.optimizers.base import checked_seed
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


@accepts_old_names(SHORTEST_PATH)
class ShortestPath:
    """Least latency per token.

    Args:
        cost_jitter: share in [0, 1] by which the cost of a server and of the links into it is
            raised at most, at random, so that many clients that plan on one snapshot take
            different chains. 0 gives the optimum. With a load prior of 0 the chain found is at
            most `1 + cost_jitter` times as slow as the optimum.
        seed: of these random factors; None draws a fresh one for every plan. With one seed a server
            keeps its factor whatever other servers there are, so servers that join or leave change
            no preference.
        load_prior: weight in [0, 1] of a prior estimate of the wait at a server against the wait
            that it announces. The prior is one pass through all blocks of the server: the wait for
            a step at a server that is always busy. The weight shrinks with the load of the busiest
            server, down to 0 where no step waits anywhere.
    """

    def __init__(self, cost_jitter: float = 0.0, seed: int | None = None, load_prior: float = 0.0):
        for name, value in (("cost_jitter", cost_jitter), ("load_prior", load_prior)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, not {value!r}")
        self._cost_jitter = cost_jitter
        self._load_prior = load_prior
        self._seed = checked_seed(seed)

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        problem = RoutingProblem.build(snapshot, request)
        if self._load_prior:
            problem = _with_prior_waits(problem, self._load_prior)
        if not self._cost_jitter:
            return problem.chain(least_latency_hosts(problem))
        seed = secrets.randbits(32) if self._seed is None else self._seed
        ids = [problem.snapshot.servers[position].id for position in problem.members]
        factors = 1 + self._cost_jitter * np.array([_draw(seed, server_id) for server_id in ids])
        return problem.chain(least_latency_hosts(problem, factors))


def _with_prior_waits(problem: RoutingProblem, weight: float) -> RoutingProblem:
    """The problem with prior waits in its visits. Chains are still priced by the snapshot."""
    servers = [problem.snapshot.servers[position] for position in problem.members]
    pass_ms = np.array([len(server.span) * server.decode_ms_per_block for server in servers])
    wait_ms = np.array([server.wait_ms for server in servers])
    weight *= min(1.0, float(np.max(wait_ms / np.maximum(pass_ms, 1e-9))))
    return dataclasses.replace(problem, hop_ms=problem.hop_ms + weight * (pass_ms - wait_ms))


def _draw(seed: int, server_id: str) -> float:
    """A number in [0, 1) that follows from both."""
    digest = hashlib.blake2b(server_id.encode(), digest_size=4, key=seed.to_bytes(4, "big"))
    return int.from_bytes(digest.digest(), "big") / 2**32


def least_latency_hosts(problem: RoutingProblem, factors: FloatArray | None = None) -> list[int]:
    """The host of every block in a chain of least latency; ties go to staying, then in order.

    `factors[n]` multiplies what each server's blocks and visits, and the links into it, cost.
    """
    scale = np.ones(problem.num_servers) if factors is None else factors
    block_ms, visit_ms = problem.decode_ms * scale, problem.hop_ms * scale
    best = np.full((problem.num_blocks, problem.num_servers), np.inf)
    first = problem.legal[0]
    best[0, first] = (problem.client_half_ms * scale + visit_ms + block_ms)[first]
    for block in range(1, problem.num_blocks):
        to = np.flatnonzero(problem.legal[block])
        arrive = problem.links.cheapest(best[block - 1], to, scale)
        best[block, to] = np.minimum(best[block - 1, to], arrive + visit_ms[to]) + block_ms[to]
    return _trace_back(problem, best, scale)


def _trace_back(problem: RoutingProblem, best: FloatArray, scale: FloatArray) -> list[int]:
    host = int(np.argmin(best[-1] + problem.client_half_ms))
    hosts = [host]
    for block in range(problem.num_blocks - 1, 0, -1):
        stay = best[block - 1, host]
        switch = best[block - 1] + problem.links.row(host) * scale[host]
        previous = int(np.argmin(switch))
        if switch[previous] + problem.hop_ms[host] * scale[host] < stay:
            host = previous
        hosts.append(host)
    return hosts[::-1]
