"""One run: a world, one optimizer, simulated until the last request has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simpy

from planetserve.config import ServerConfig
from planetserve.simulation.client import Directory, Policy, SimClient
from planetserve.simulation.events import later
from planetserve.simulation.ring import Step
from planetserve.simulation.server import SimServer
from planetserve.simulation.session import Record, Session
from planetserve.simulation.turnover import Turnover
from planetserve.simulation.world import World

_SERVER_CONFIG = ServerConfig(model="simulated", num_blocks=1, new_swarm=True)
_LOOK_S = 10.0
_CHANGE = 1.25
"""Period in seconds at which a server checks its load, and factor that counts as a change; as in
`server/announcer.py`."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The raw results of a run."""

    records: list[Record]
    """Records of all requests, in the order in which they ended."""
    tokens_in_window: int
    """Tokens that users got between warm-up and the last arrival."""
    busy_share: float
    """Fraction of the time that servers computed, averaged over servers and the whole run."""
    tokens_per_tick: float
    departures: int


class _Uplinks:
    """The uplinks of nodes, each of which sends one step after the other."""

    def __init__(self, env: simpy.Environment, num_nodes: int, bytes_per_token: float):
        self._env = env
        self._bytes_per_token = bytes_per_token
        self._free_s = [0.0] * num_nodes

    def send_s(self, node: int, num_tokens: int, bytes_per_s: float) -> float:
        """Seconds until the node has sent these tokens, after everything queued before them."""
        now_s = self._env.now
        took_s = num_tokens * self._bytes_per_token / bytes_per_s
        self._free_s[node] = free_s = max(now_s, self._free_s[node]) + took_s
        return free_s - now_s


class Simulation:
    """The state that sessions and servers share. Call `run` once.

    Args:
        world: a scenario with its random draws.
        policy: of all clients.
        on_progress: called after each request with the fraction of requests that have ended.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        on_progress: Callable[[float], None] | None = None,
    ):
        scenario = world.scenario
        self.world = world
        self.env = simpy.Environment()
        self.number_of = {machine.id: i for i, machine in enumerate(world.machines)}
        self.servers = [
            SimServer(
                self.env,
                number,
                machine,
                span,
                scenario.machines.cache_tokens,
                self._send_on,
            )
            for number, (machine, span) in enumerate(zip(world.machines, world.spans, strict=True))
        ]
        self._directory = Directory(len(self.servers), _SERVER_CONFIG.expiration_s)
        self._policy = policy
        self._clients = [
            SimClient(world, number, policy, self._directory, self.servers)
            for number in range(world.num_clients)
        ]
        self._announced: dict[int, tuple[float, float]] = {}
        self._uplinks = _Uplinks(
            self.env,
            len(self.servers) + world.num_clients,
            scenario.model.activation_bytes_per_token,
        )
        self._client_bytes_per_s = scenario.network.client_mbit_s * 125_000.0
        self._overhead_s = scenario.network.hop_overhead_ms / 1000.0
        self._records: list[Record] = []
        self._tokens_in_window = 0
        self._finished = self.env.event()
        self._on_progress = on_progress

    def run(self) -> RunResult:
        """Simulate until every request has ended."""
        phases = np.random.default_rng([self.world.seed, 1]).uniform(0, _LOOK_S, len(self.servers))
        for server in self.servers:
            self._publish(server)
            later(self.env, float(phases[server.number]), self._look, server)
        turnover = Turnover(self.env, self.world, self.servers, self._directory)
        turnover.start()
        if self.world.requests:
            later(self.env, self.world.requests[0].arrival_s, self._arrival, 0)
            self.env.run(until=self._finished)
        ticks = sum(server.num_ticks for server in self.servers)
        lasted_s = max(self.env.now, 1e-9)
        return RunResult(
            records=self._records,
            tokens_in_window=self._tokens_in_window,
            busy_share=sum(server.busy_s for server in self.servers)
            / (lasted_s * len(self.servers)),
            tokens_per_tick=sum(server.num_tokens for server in self.servers) / max(1, ticks),
            departures=turnover.departures,
        )

    def send_into(self, client: SimClient, step: Step) -> None:
        """Send a step to hop `step.hop`, from the one before it or from the client."""
        ring, hop = step.ring, step.hop
        node, rate = client.node, self._client_bytes_per_s
        if hop:
            node = ring.servers[hop - 1]
            rate = self.servers[node].machine.network_bytes_per_s
        delay_s = self._uplinks.send_s(node, step.num_tokens, rate)
        delay_s += ring.half_s[hop] + self._overhead_s
        later(self.env, delay_s, self.servers[ring.servers[hop]].arrive, step)

    def count_token(self, now_s: float) -> None:
        """Count a token that a user received."""
        workload = self.world.scenario.workload
        if workload.warmup_s <= now_s < workload.duration_s:
            self._tokens_in_window += 1

    def ended(self, record: Record) -> None:
        """A request is over."""
        self._records.append(record)
        if self._on_progress is not None:
            self._on_progress(len(self._records) / len(self.world.requests))
        if len(self._records) == len(self.world.requests):
            self._finished.succeed()

    def _arrival(self, number: int) -> None:
        requests = self.world.requests
        if number + 1 < len(requests):
            gap_s = requests[number + 1].arrival_s - requests[number].arrival_s
            later(self.env, gap_s, self._arrival, number + 1)
        request = requests[number]
        client = self._clients[request.client]
        Session(self, client, request, number, self._policy.moves).begin()

    def _send_on(self, server: SimServer, step: Step) -> None:
        """Send a step from a server to the next one, or the last result to the client."""
        ring = step.ring
        following = step.hop + 1
        if following == step.stop:
            ring.session.result(step)
            return
        is_last = following == len(ring.servers)
        # Only the last position of a prompt is sent to the client.
        tokens = 1 if is_last else step.num_tokens
        rate = server.machine.network_bytes_per_s
        delay_s = self._uplinks.send_s(server.number, tokens, rate)
        delay_s += ring.half_s[following]
        if is_last:
            later(self.env, delay_s, ring.session.result, step)
        else:
            step.hop = following
            next_server = self.servers[ring.servers[following]]
            later(self.env, delay_s + self._overhead_s, next_server.arrive, step)

    def _look(self, server: SimServer) -> None:
        """As `Announcer`: publish once a period, and when the load has changed."""
        if server.is_up and not server.is_draining:
            announced_s, announced_ms = self._announced[server.number]
            low, high = sorted((server.load_ms, announced_ms))
            if self.env.now - announced_s >= _SERVER_CONFIG.update_period or high > _CHANGE * low:
                self._publish(server)
        later(self.env, _LOOK_S, self._look, server)

    def _publish(self, server: SimServer) -> None:
        self._announced[server.number] = self.env.now, server.load_ms
        self._directory.announce(server.number, self.env.now, server.point())
