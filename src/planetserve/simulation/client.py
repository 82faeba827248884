"""The clients' knowledge and planning: announcements, loads of servers in use, the real optimizer.

A client reads the directory when it opens a session and before it moves one, unless it has just
done so, and otherwise once per `update_period`. It knows the present load of the servers that it
uses, because every answer carries it, and all true round-trip times. In a swarm larger than
`VIEW_SERVERS` it plans on the best holders of each block (`routing/shortlist.py`); optimizers that
ignore links and speeds get a sample of all servers instead, because the shortlist would already be
a good choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from planetserve.config import ClientConfig, current_options
from planetserve.errors import ConfigError, NoChainAvailable
from planetserve.routing.arrays import FloatArray
from planetserve.routing.optimizers import ChainOptimizer, create_optimizer
from planetserve.routing.request import ChainRequest
from planetserve.routing.round_trips import RttMatrix
from planetserve.routing.shortlist import best_holders
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.simulation.ring import Ring
from planetserve.simulation.server import SimServer
from planetserve.simulation.world import World
from planetserve.types import BlockSpan, Chain, Hop

CLIENT_CONFIG = ClientConfig()
VIEW_SERVERS = 128
"""Maximum number of servers that a simulated client plans on; it keeps large swarms affordable."""
FRESH_S = 5.0
"""Maximum age in seconds of a view of the directory that is not renewed, as in
`ServerDiscovery`."""
_BLIND = frozenset({"random", "petals_max_throughput"})
"""Optimizers that use neither links nor speeds."""
_FLAGS = ("moves", "folded", "informed")
"""Fields of `Policy` that its text may set."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How clients choose chains.

    Raises:
        ConfigError: there is no such optimizer, or it has no such option.
    """

    optimizer: str
    """Name and options, as in `ClientConfig.chain_optimizer`."""
    moves: bool = False
    """Whether running sessions look for better chains, as the real client's do."""
    folded: bool = False
    """Whether load counts as time per block instead of as a wait per visit: for optimizers such as
    Petals' that do not know of waits."""
    informed: bool = False
    """Whether clients know all present loads, which no real client can; shows the value of better
    information."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", current_options(self.optimizer))
        self.create(0)  # a mistyped name should fail here

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `"NAME"` or `"NAME:option=value"`, with any of `_FLAGS` behind it, as in `"+moves"`.

        Raises:
            ConfigError: it has another form.
        """
        optimizer, *flags = text.split("+")
        unknown = sorted(set(flags) - set(_FLAGS))
        if unknown:
            known = " or ".join(f"+{flag}" for flag in _FLAGS)
            raise ConfigError(f"{text[:80]!r}: write {known}, not +{unknown[0]}")
        return cls(optimizer, **{flag: flag in flags for flag in _FLAGS})

    @override
    def __str__(self) -> str:
        return self.optimizer + "".join(f"+{flag}" for flag in _FLAGS if getattr(self, flag))

    @property
    def is_blind(self) -> bool:
        return self.optimizer.partition(":")[0] in _BLIND

    def create(self, seed: int) -> ChainOptimizer:
        """The optimizer, made as `ChainPlanner` makes it."""
        return create_optimizer(
            self.optimizer,
            cost_jitter=CLIENT_CONFIG.chain_cost_jitter,
            load_prior=CLIENT_CONFIG.chain_load_prior,
            seed=seed,
        )


class Directory:
    """The latest announcements of servers, in columns, since a client reads all of them.

    Args:
        num_servers: how many there are.
        lifetime_s: seconds that a record stays when its owner falls silent.
    """

    def __init__(self, num_servers: int, lifetime_s: float):
        self.points: list[ServerPoint | None] = [None] * num_servers
        self.start = np.zeros(num_servers, dtype=np.intp)
        self.end = np.zeros(num_servers, dtype=np.intp)
        self.ms_per_block = np.zeros(num_servers)
        """Time per block through the whole span, waiting included."""
        self._lifetime_s = lifetime_s
        self._until_s = np.full(num_servers, -np.inf)

    def announce(self, server: int, now_s: float, point: ServerPoint) -> None:
        """Store a record."""
        self.points[server] = point
        self.start[server], self.end[server] = point.start, point.end
        self.ms_per_block[server] = point.decode_ms_per_block + point.wait_ms / len(point.span)
        self._until_s[server] = now_s + self._lifetime_s

    def withdraw(self, server: int) -> None:
        """Remove a server's record, if there is one."""
        self._until_s[server] = -np.inf

    def lookup(self, now_s: float) -> NDArray[np.intp]:
        """Numbers of the servers that have a record, ascending."""
        return np.flatnonzero(self._until_s > now_s)


class SimClient:
    """A user's machine.

    Args:
        world: where it is.
        number: which client.
        policy: how it plans.
        directory: where it looks servers up.
        servers: whose present load it knows while it uses them.
    """

    def __init__(
        self,
        world: World,
        number: int,
        policy: Policy,
        directory: Directory,
        servers: list[SimServer],
    ):
        self.name = f"c{number}"
        self.node = world.client_node(number)
        self.rings: dict[Ring, None] = {}
        """Its open sessions."""
        self._world = world
        self._policy = policy
        self._directory = directory
        self._servers = servers
        self._rng = np.random.default_rng([world.seed, number])
        self._known_at_s = -np.inf
        self._known: list[tuple[int, ServerPoint]] = []
        self._banned_until_s: dict[int, float] = {}

    def draw_seed(self) -> int:
        """The seed of a new session, which keeps it."""
        return int(self._rng.integers(2**32))

    def ban(self, server: int, until_s: float) -> None:
        """Leave the server out of plans for a while."""
        self._banned_until_s[server] = until_s

    def refresh(self, now_s: float) -> bool:
        """Read the directory, unless that has just been done; say whether it was read."""
        if now_s - self._known_at_s < FRESH_S:
            return False
        self._look_up(now_s)
        return True

    def _look_up(self, now_s: float) -> None:
        self._known_at_s = now_s
        found = self._directory.lookup(now_s)
        if len(found) > VIEW_SERVERS and self._policy.is_blind:
            found = np.sort(self._rng.choice(found, VIEW_SERVERS, replace=False))
        self._known = _seen(self._world, self.node, self._directory, found)

    def snapshot(self, now_s: float, own: Ring | None = None, lease: int = 0) -> SwarmSnapshot:
        """What the client plans on.

        Args:
            now_s: time.
            own: a session whose `lease` tokens count as free where it has them.
        """
        members, points = [], []
        for number, point in self._usable(now_s, own, lease):
            members.append(number)
            points.append(point)
        return _snapshot(self._world, points, self._world.links.matrix([*members, self.node]))

    def plan(self, snapshot: SwarmSnapshot, tokens: int, seed: int) -> Chain:
        """A chain with room for `tokens`.

        Raises:
            NoChainAvailable: there is none now.
        """
        if not snapshot.servers:
            raise NoChainAvailable("no server is known")
        return self._policy.create(seed).plan(snapshot, ChainRequest(tokens=tokens))

    def plan_gap(
        self,
        now_s: float,
        span: BlockSpan,
        sides: tuple[int | None, int | None],
        without: Collection[int],
        lease: int,
        seed: int,
    ) -> Chain:
        """Hops that take over `span` of a chain, as `ChainPlanner` plans them: the place of the
        client is taken by the hops on both sides.

        Args:
            span: the blocks.
            sides: the servers before and after the gap, None for the client.
            without: servers not to use.

        Raises:
            NoChainAvailable: no server can.
        """
        members, points = [], []
        for number, point in self._usable(now_s, None, 0):
            shared = span.overlap(point.span)
            if number not in without and shared:
                start, end = shared.start - span.start, shared.stop - span.start
                members.append(number)
                points.append(replace(point, start=start, end=end))
        links = self._world.links
        half = links.matrix([*members, self.node])
        before, after = (self.node if side is None else side for side in sides)
        if members:
            to_sides = [
                (links.half_ms(before, number) + links.half_ms(after, number)) / 2
                for number in members
            ]
            half[-1, :-1] = half[:-1, -1] = to_sides
        gap = self.plan(_snapshot(self._world, points, half, len(span)), lease, seed)
        hops = [Hop(hop.peer_id, hop.start + span.start, hop.end + span.start) for hop in gap]
        return Chain(tuple(hops), gap.latency_ms, gap.throughput_tokens_per_s)

    def _usable(
        self, now_s: float, own: Ring | None, lease: int
    ) -> Iterator[tuple[int, ServerPoint]]:
        """Servers that are not banned, with the loads that this client's own answers carry."""
        if now_s - self._known_at_s > CLIENT_CONFIG.update_period:
            self._look_up(now_s)  # as the real client's timer does
        in_use = {number for ring in self.rings for number in ring.servers}
        own_servers = set() if own is None else set(own.servers)
        for number, point in self._known:
            if self._banned_until_s.get(number, 0.0) > now_s:
                continue
            server = self._servers[number]
            if (number in in_use or self._policy.informed) and server.is_up:
                now = server.point()
                point = replace(
                    point, decode_ms_per_block=now.decode_ms_per_block, wait_ms=now.wait_ms
                )
            if self._policy.folded:
                decode_ms = point.decode_ms_per_block + point.wait_ms / len(point.span)
                point = replace(point, decode_ms_per_block=decode_ms, wait_ms=0.0)
            if number in own_servers:
                point = replace(point, free_cache_tokens=point.free_cache_tokens + lease)
            yield number, point


def _seen(
    world: World, node: int, directory: Directory, found: NDArray[np.intp]
) -> list[tuple[int, ServerPoint]]:
    """The best holders among the servers `found`, by a token's time if one could run all blocks."""
    num_blocks = world.scenario.model.num_blocks
    half = world.links.column(node, len(world.machines))[found]
    cost = 2 * half + num_blocks * directory.ms_per_block[found]
    start, end = directory.start[found], directory.end[found]
    best = found[best_holders(start, end, cost, num_blocks, VIEW_SERVERS)].tolist()
    return [(number, point) for number in best if (point := directory.points[number]) is not None]


def _snapshot(
    world: World, points: list[ServerPoint], half: FloatArray, num_blocks: int | None = None
) -> SwarmSnapshot:
    scenario = world.scenario
    return SwarmSnapshot(
        num_blocks=num_blocks or scenario.model.num_blocks,
        activation_bytes_per_token=scenario.model.activation_bytes_per_token,
        hop_overhead_ms=scenario.network.hop_overhead_ms,
        default_rtt_ms=0.0,  # no pair is missing
        servers=tuple(points),
        rtt_ms=RttMatrix(half),
    )


def idle_directory(world: World) -> Directory:
    """What all servers would announce without any load."""
    directory = Directory(len(world.machines), np.inf)
    for number, (machine, span) in enumerate(zip(world.machines, world.spans, strict=True)):
        point = ServerPoint(
            id=machine.id,
            start=span.start,
            end=span.end,
            decode_ms_per_block=machine.decode_ms_per_block,
            tokens_per_s_per_block=machine.tokens_per_s_per_block,
            network_bytes_per_s=machine.network_bytes_per_s,
            free_cache_tokens=world.scenario.machines.cache_tokens,
        )
        directory.announce(number, 0.0, point)
    return directory


def idle_snapshot(world: World, client: int, directory: Directory) -> SwarmSnapshot:
    """What a client with sight would plan on if `directory` were all it knew."""
    node = world.client_node(client)
    seen = _seen(world, node, directory, directory.lookup(0.0))
    half = world.links.matrix([*(number for number, _ in seen), node])
    return _snapshot(world, [point for _, point in seen], half)
