"""Random small swarms, and every chain on them, priced straight from the problem's statement.

Shares no code with `planetserve.routing`: a chain is a host per block; all are enumerated.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from planetserve.routing.round_trips import RttMatrix
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.types import CLIENT


def random_snapshot(
    rng: np.random.Generator, num_servers: int, num_blocks: int, scale: float = 1.0
) -> SwarmSnapshot:
    """A swarm whose first server holds everything; RTTs are independent draws, so not metric.

    A small `scale` makes links cheap against compute, which makes many hops and revisits pay.
    """
    servers = []
    for i in range(num_servers):
        start, end = sorted(rng.choice(num_blocks + 1, size=2, replace=False).tolist())
        if i == 0:
            start, end = 0, num_blocks
        servers.append(
            ServerPoint(
                id=f"s{i}",
                start=start,
                end=end,
                decode_ms_per_block=float(rng.uniform(0.5, 5.0)),
                tokens_per_s_per_block=float(rng.uniform(500, 8000)),
                network_bytes_per_s=float(10 ** rng.uniform(6.5, 8)),
                free_cache_tokens=int(rng.integers(1000, 9000)),
                reputation=float(rng.uniform(0, 1)),
                price=float(rng.uniform(0, 2)),
            )
        )
    names = [CLIENT, *(server.id for server in servers)]
    rtt: dict[str, dict[str, float]] = {}
    for first, second in itertools.combinations(names, 2):
        if rng.random() < 0.9:
            first, second = (second, first) if rng.random() < 0.5 else (first, second)
            rtt.setdefault(first, {})[second] = float(rng.uniform(0.1, 100)) * scale
    # Half of them wait for others, as under load.
    waits_ms = rng.uniform(0, 20, num_servers) * (rng.random(num_servers) < 0.5) * scale
    servers = [
        dataclasses.replace(server, wait_ms=wait_ms)
        for server, wait_ms in zip(servers, waits_ms.tolist(), strict=True)
    ]
    return SwarmSnapshot(
        num_blocks=num_blocks,
        activation_bytes_per_token=16384,
        hop_overhead_ms=float(rng.uniform(0, 5)) * scale,
        default_rtt_ms=50.0 * scale,
        servers=tuple(servers),
        rtt_ms=rtt,
    )


def all_chains(snapshot: SwarmSnapshot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every assignment of blocks to servers `[chains, blocks]`, its latency and its throughput."""
    servers, num_blocks = snapshot.servers, snapshot.num_blocks
    legal = [
        [i for i, s in enumerate(servers) if s.start <= block < s.end]
        for block in range(num_blocks)
    ]
    hosts = np.stack(np.meshgrid(*legal, indexing="ij"), axis=-1).reshape(-1, num_blocks)
    names = [*(s.id for s in servers), CLIENT]
    rtt = np.array([[_rtt(snapshot, a, b) for b in names] for a in names])
    decode = np.array([s.decode_ms_per_block for s in servers])
    network = np.array([s.network_bytes_per_s for s in servers])
    bytes_out = snapshot.activation_bytes_per_token
    latency = rtt[-1][hosts[:, 0]] / 2 + rtt[-1][hosts[:, -1]] / 2 + decode[hosts].sum(axis=1)
    starts_hop = np.ones(hosts.shape, dtype=bool)
    starts_hop[:, 1:] = hosts[:, 1:] != hosts[:, :-1]
    wait = np.array([s.wait_ms for s in servers])
    visit = snapshot.hop_overhead_ms + wait + 1000 * bytes_out / network
    latency += (starts_hop * visit[hosts]).sum(axis=1)
    for block in range(1, num_blocks):
        latency += rtt[hosts[:, block - 1], hosts[:, block]] / 2
    throughput = np.full(len(hosts), np.inf)
    for i, server in enumerate(servers):
        mine = hosts == i
        blocks, hops = mine.sum(axis=1), (mine & starts_hop).sum(axis=1)
        with np.errstate(divide="ignore"):
            throughput = np.minimum(throughput, server.tokens_per_s_per_block / blocks)
            throughput = np.minimum(throughput, server.network_bytes_per_s / (bytes_out * hops))
    return hosts, latency, throughput


def _rtt(snapshot: SwarmSnapshot, a: str, b: str) -> float:
    if a == b:
        return 0.0
    table = snapshot.rtt_ms
    if isinstance(table, RttMatrix):
        raise TypeError(
            "brute force reads a table of names, so that it shares no code with planners"
        )
    return table.get(a, {}).get(b, table.get(b, {}).get(a, snapshot.default_rtt_ms))
