"""Servers that leave, announced or not, and come back with the blocks that need them most."""

from __future__ import annotations

import numpy as np
import simpy

from planetserve.routing.placement import PLACEMENTS
from planetserve.simulation.client import CLIENT_CONFIG, Directory
from planetserve.simulation.events import later
from planetserve.simulation.server import SimServer
from planetserve.simulation.world import World, join

_DETECT_S = CLIENT_CONFIG.probe_after + CLIENT_CONFIG.ping_timeout
"""Seconds until the client of a step knows that a server is silent."""


class Turnover:
    """Makes servers leave and return as the scenario says. `start` once.

    When and how a server leaves depends on the seed alone, so it is the same for every optimizer.
    The same holds for its blocks when it returns, since these depend on the servers that are there.
    """

    def __init__(
        self,
        env: simpy.Environment,
        world: World,
        servers: list[SimServer],
        directory: Directory,
    ):
        self.departures = 0
        """Number of departures so far."""
        self._env = env
        self._churn = world.scenario.churn
        self._seed = world.seed
        self._directory = directory
        self._servers = servers
        self._dice: list[np.random.Generator] = []
        self._is_fixed = bool(world.scenario.machines.spans)
        self._placement = PLACEMENTS.create(world.scenario.machines.placement)
        self._covered = np.zeros(world.scenario.model.num_blocks)

    def start(self) -> None:
        """Schedule the first departure of every server; there are none without churn."""
        if self._churn is None:
            return
        for server in self._servers:
            self._count(server, 1.0)
            self._dice.append(np.random.default_rng([self._seed, 2, server.number]))
            self._stay(server)

    def _stay(self, server: SimServer) -> None:
        if self._churn is not None:
            up_s = float(self._dice[server.number].exponential(self._churn.mean_up_s))
            later(self._env, up_s, self._leave, server)

    def _leave(self, server: SimServer) -> None:
        if self._churn is None:
            return
        self.departures += 1
        if self._dice[server.number].random() >= self._churn.graceful:
            self._go(server)
            return
        server.is_draining = True
        self._directory.withdraw(server.number)
        for ring in server.rings:
            ring.session.server_leaves(server.number)
        later(self._env, self._churn.drain_s, self._go, server)

    def _go(self, server: SimServer) -> None:
        """Fall silent. Sessions that are still there notice after a while."""
        if self._churn is None:
            return
        for ring in server.rings:
            later(self._env, _DETECT_S, ring.session.lost, server.number)
        server.stop()
        self._count(server, -1.0)
        down_s = float(self._dice[server.number].exponential(self._churn.mean_down_s))
        later(self._env, down_s + self._churn.load_s, self._return, server)

    def _return(self, server: SimServer) -> None:
        span = server.span
        if not self._is_fixed:
            span = join(self._placement, server.machine, self._covered)
        server.start(span)
        self._count(server, 1.0)
        self._directory.announce(server.number, self._env.now, server.point())
        self._stay(server)

    def _count(self, server: SimServer, sign: float) -> None:
        span = server.span
        rate = server.machine.tokens_per_s_per_block / len(span)
        self._covered[span.start : span.end] += sign * rate
        # Sums of floats do not return to zero by themselves.
        self._covered[self._covered < 1e-6 * rate] = 0.0
