"""What happens to a simulated swarm, drawn from a seed: who is in it, and what befalls it when."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from planetserve.crypto.identity import Identity
from planetserve.testing.simulated_roles import ServerPlan
from planetserve.types import BlockSpan

MAX_SKEW_S = 600.0
AIMED = 0.7
_KINDS = ("cut", "one_way", "slow", "reset", "crash", "silent", "pause", "drain", "directory")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens.

    Attributes:
        kind: `cut` and `one_way` hold up what is between two, `slow` slows it down, `reset` breaks
            their connection; `crash` and `silent` end a server, which comes back after `for_s`;
            `pause` stops it; `drain` has it leave and come back; `directory` keeps it from the
            directory.
        at_s: when, from the start.
        for_s: how long.
        first: number of the server.
        second: the other end: a server, or after the servers a client.
        aim: below `AIMED`, it meets a hop of a session that is open then, and what is next to it.
    """

    kind: str
    at_s: float
    for_s: float
    first: int
    second: int
    aim: float


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """A swarm, its clients and its faults."""

    num_blocks: int
    servers: tuple[ServerPlan, ...]
    clients: tuple[Identity, ...]
    skews_s: tuple[float, ...]
    """By how much each client's clock is ahead."""
    faults: tuple[Fault, ...]
    calm_s: float
    """When the last fault is over."""
    peace_s: float
    """When the first one begins."""
    is_roomy: bool
    """Whether every server has room for all sessions."""


def draw_plan(seed: int) -> SwarmPlan:
    """The swarm of a seed; the same whenever it is asked for."""
    rng = random.Random(seed)
    num_blocks = rng.randint(3, 8)
    num_servers = min(rng.randint(3, 20), rng.randint(3, 20))
    num_clients = rng.randint(1, 3)
    is_roomy = rng.random() < 0.7
    spans = list(_cover(rng, num_blocks))
    spans += list(_cover(rng, num_blocks))
    while len(spans) < num_servers:
        start = rng.randrange(num_blocks)
        spans.append(BlockSpan(start, rng.randint(start + 1, num_blocks)))
    servers = tuple(_server(rng, span, is_roomy=is_roomy) for span in spans)
    faults = tuple(_faults(rng, len(servers), num_clients)) if rng.random() < 0.9 else ()
    return SwarmPlan(
        num_blocks=num_blocks,
        servers=servers,
        clients=tuple(_identity(rng) for _ in range(num_clients)),
        skews_s=tuple(_skew_s(rng) for _ in range(num_clients)),
        faults=faults,
        calm_s=max((fault.at_s + fault.for_s for fault in faults), default=0.0),
        peace_s=min((fault.at_s for fault in faults), default=math.inf),
        is_roomy=is_roomy,
    )


def _cover(rng: random.Random, num_blocks: int) -> Iterator[BlockSpan]:
    start = 0
    while start < num_blocks:
        end = rng.randint(start + 1, num_blocks)
        yield BlockSpan(start, end)
        start = end


def _server(rng: random.Random, span: BlockSpan, *, is_roomy: bool) -> ServerPlan:
    page_size = rng.choice((1, 4, 16))
    num_tokens = 8192 if is_roomy else rng.choice((160, 320, 640))
    return ServerPlan(
        identity=_identity(rng),
        span=span,
        num_pages=num_tokens // page_size,
        page_size=page_size,
        block_s=rng.choice((0.0005, 0.002, 0.01)),
        skew_s=_skew_s(rng),
        max_chunk_tokens=rng.choice((16, 32, 512)),
        overcommit=rng.choice((1.0, 2.0)),
        update_period_s=rng.choice((45.0, 60.0, 120.0)),
    )


def _faults(rng: random.Random, num_servers: int, num_clients: int) -> Iterator[Fault]:
    kinds = rng.sample(_KINDS, rng.randint(1, len(_KINDS)))
    for _ in range(rng.randint(1, 12)):
        second = rng.randrange(num_servers + num_clients)
        first = rng.randrange(num_servers)
        if first == second:
            continue
        yield Fault(
            kind=rng.choice(kinds),
            at_s=rng.uniform(0.0, 30.0),
            for_s=rng.choice((0.5, 3.0, 10.0, 60.0)),
            first=first,
            second=second,
            aim=rng.random(),
        )


def _skew_s(rng: random.Random) -> float:
    return rng.choice((0.0, rng.uniform(-2.0, 2.0), rng.uniform(-MAX_SKEW_S, MAX_SKEW_S)))


def _identity(rng: random.Random) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(rng.randbytes(32)))
