"""The plan of a simulated swarm, drawn from a seed: its servers and clients, and its faults over
time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from planetserve.crypto.identity import Identity
from planetserve.testing.lies import LIES
from planetserve.testing.simulated_roles import ServerPlan
from planetserve.testing.virtual_time import ClockError
from planetserve.types import BlockSpan

MAX_SKEW_S = 600.0
MAX_DRIFT = 5e-4
AIMED = 0.7
LINK_FAULTS = ("cut", "one_way", "slow", "reset")
"""Faults of the connection between two nodes."""
NODE_FAULTS = ("crash", "silent", "pause", "drain", "lie", "directory", "join")
"""Faults of one server."""
FAULTS = LINK_FAULTS + NODE_FAULTS


@dataclass(frozen=True, slots=True)
class SwarmShape:
    """The parameters from which swarms are drawn.

    Attributes:
        servers: minimum and maximum number of servers.
        clients: minimum and maximum number of clients.
        weights: kinds of faults with their weights; empty: some kinds of equal weight, which the
            seed draws.
        receipts: whether servers give receipts and clients ask for them.
    """

    servers: tuple[int, int] = (3, 20)
    clients: tuple[int, int] = (1, 3)
    weights: tuple[tuple[str, float], ...] = ()
    receipts: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        kind: `cut` and `one_way` block the link of two nodes, `slow` slows it down, `reset` breaks
            their connection; `crash` and `silent` end a server, which comes back after `for_s`;
            `pause` stops it; with `drain` it leaves and comes back; `lie` makes it hostile;
            `directory` makes the directory unreachable for it; `join` is the first start of a
            server.
        at_s: seconds from the start.
        for_s: its duration in seconds.
        first: number of the server.
        second: number of the other end; clients are numbered after the servers.
        aim: in [0, 1); below `AIMED` the fault is moved to a hop of an open session and its
            neighbour.
        lie: what a hostile server does, one of `LIES`; empty otherwise.
    """

    kind: str
    at_s: float
    for_s: float
    first: int
    second: int
    aim: float
    lie: str = ""


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """A swarm, its clients and its faults."""

    num_blocks: int
    servers: tuple[ServerPlan, ...]
    clients: tuple[Identity, ...]
    clocks: tuple[ClockError, ...]
    """Of the clients."""
    faults: tuple[Fault, ...]
    last_fault_end_s: float
    """When the last fault is over."""
    first_fault_s: float
    """When the first fault begins."""
    is_roomy: bool
    """Whether every server has room for all sessions."""
    receipts: bool
    """Whether servers give receipts and clients ask for them."""


def draw_plan(seed: int, shape: SwarmShape) -> SwarmPlan:
    """The swarm of a seed; always the same."""
    rng = random.Random(seed)
    num_blocks = rng.randint(3, 8)
    num_servers = min(rng.randint(*shape.servers), rng.randint(*shape.servers))
    num_clients = rng.randint(*shape.clients)
    is_roomy = rng.random() < 0.7
    spans = list(_cover(rng, num_blocks, num_servers))
    spans += list(_cover(rng, num_blocks, num_servers - len(spans)))
    num_needed = len(spans)
    while len(spans) < num_servers:
        start = rng.randrange(num_blocks)
        spans.append(BlockSpan(start, rng.randint(start + 1, num_blocks)))
    servers = tuple(_server(rng, span, is_roomy=is_roomy) for span in spans)
    faults: tuple[Fault, ...] = ()
    if rng.random() < 0.9:
        faults = tuple(_faults(rng, len(servers), num_needed, num_clients, shape))
    return SwarmPlan(
        num_blocks=num_blocks,
        servers=servers,
        clients=tuple(_identity(rng) for _ in range(num_clients)),
        clocks=tuple(_clock(rng) for _ in range(num_clients)),
        faults=faults,
        last_fault_end_s=max((fault.at_s + fault.for_s for fault in faults), default=0.0),
        first_fault_s=min((fault.at_s for fault in faults), default=math.inf),
        is_roomy=is_roomy,
        receipts=shape.receipts,
    )


def _cover(rng: random.Random, num_blocks: int, most: int) -> Iterator[BlockSpan]:
    """Spans of a chain of at most `most` servers."""
    start = 0
    while start < num_blocks and most > 0:
        end = num_blocks if most == 1 else rng.randint(start + 1, num_blocks)
        yield BlockSpan(start, end)
        start, most = end, most - 1


def _server(rng: random.Random, span: BlockSpan, *, is_roomy: bool) -> ServerPlan:
    page_size = rng.choice((1, 4, 16))
    num_tokens = 8192 if is_roomy else rng.choice((160, 320, 640))
    return ServerPlan(
        identity=_identity(rng),
        span=span,
        num_pages=num_tokens // page_size,
        page_size=page_size,
        block_s=rng.choice((0.0005, 0.002, 0.01)),
        clock=_clock(rng),
        max_chunk_tokens=rng.choice((16, 32, 512)),
        overcommit=rng.choice((1.0, 2.0)),
        update_period_s=rng.choice((60.0, 120.0, 240.0)),
    )


def _faults(
    rng: random.Random, num_servers: int, num_needed: int, num_clients: int, shape: SwarmShape
) -> Iterator[Fault]:
    """Faults; servers from number `num_needed` on may be absent at first."""
    kinds = dict(shape.weights) or dict.fromkeys(rng.sample(FAULTS, rng.randint(1, 8)), 1.0)
    late = list(range(num_needed, num_servers))
    for _ in range(rng.randint(1, 12)):
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        first, second = rng.randrange(num_servers), rng.randrange(num_servers + num_clients)
        at_s, for_s = rng.uniform(0.0, 30.0), rng.choice((0.5, 3.0, 10.0, 60.0))
        aim, lie = rng.random(), rng.choice(LIES)
        if kind == "join":
            if late:
                yield Fault(kind, at_s, 0.0, late.pop(), second, 1.0)
        elif first != second:
            yield Fault(kind, at_s, for_s, first, second, aim, lie if kind == "lie" else "")


def _clock(rng: random.Random) -> ClockError:
    return ClockError(
        ahead_s=rng.choice((0.0, rng.uniform(-2.0, 2.0), rng.uniform(-MAX_SKEW_S, MAX_SKEW_S))),
        drift=rng.choice((0.0, rng.uniform(-MAX_DRIFT, MAX_DRIFT))),
        uptime_s=rng.uniform(0.0, 1e6),
    )


def _identity(rng: random.Random) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(rng.randbytes(32)))
