"""Random swarms to plan on. Seeded; every block has at least one holder.

Two kinds. `scattered` draws everything on its own, round-trip times too, so that nothing is metric
and nothing is alike: the hardest for a search. `geographic` puts servers into cities, gives them
one of a few GPU classes and a link, and derives round-trip times from places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.types import CLIENT

ACTIVATION_BYTES = 16384.0
"""One bfloat16 token of hidden size 8192, as in a 70-billion-parameter Llama."""

_GPUS = ((0.9, 9000.0), (1.6, 5200.0), (2.4, 3300.0), (4.5, 1500.0), (9.0, 600.0))
"""(decode ms per block, tokens/s per block) of five classes, fast to slow; made up, not measured:
what matters to a planner is that they differ by an order of magnitude."""
_FIBRE_KM_PER_MS = 100.0
"""Kilometres of round trip that light in fibre covers per millisecond: 200 km/ms there and back."""


def scattered(
    num_servers: int, num_blocks: int, seed: int, longest: float = 0.33, known: float = 1.0
) -> SwarmSnapshot:
    """Independent draws.

    Args:
        longest: spans are up to this part of the model.
        known: part of the pairs that have a round-trip time of their own; the others the default.
    """
    rng = np.random.default_rng(seed)
    spans = _spans(rng, num_servers, num_blocks, longest)
    servers = [
        ServerPoint(
            id=f"s{i}",
            start=start,
            end=end,
            decode_ms_per_block=float(rng.uniform(0.5, 5.0)),
            tokens_per_s_per_block=float(rng.uniform(500, 8000)),
            network_bytes_per_s=float(10 ** rng.uniform(6.5, 8.5)),
            free_cache_tokens=8192,
            reputation=float(rng.uniform(0.5, 1.0)),
            price=float(rng.uniform(0.1, 2.0)),
        )
        for i, (start, end) in enumerate(spans)
    ]
    if known < 1.0:
        return _snapshot(servers, num_blocks, _table(
            num_servers, lambda _, others: rng.uniform(2.0, 200.0, size=len(others)), rng, known
        ))  # fmt: skip
    rtt = rng.uniform(2.0, 200.0, size=(num_servers + 1, num_servers + 1))
    return _snapshot(
        servers, num_blocks, _table(num_servers, lambda i, others: rtt[i, others], rng, known)
    )


def geographic(
    num_servers: int, num_blocks: int, seed: int, longest: float = 0.33, known: float = 1.0
) -> SwarmSnapshot:
    """Servers in cities on a plane of 8,000 by 5,000 km; arguments as for `scattered`."""
    rng = np.random.default_rng(seed)
    cities = rng.uniform((0, 0), (8000, 5000), size=(max(3, num_servers // 8), 2))
    places = cities[rng.integers(len(cities), size=num_servers + 1)]
    places = places + rng.normal(0, 20, size=places.shape)
    spans = _spans(rng, num_servers, num_blocks, longest)
    servers = []
    for i, (start, end) in enumerate(spans):
        decode_ms, rate = _GPUS[int(rng.integers(len(_GPUS)))]
        servers.append(
            ServerPoint(
                id=f"s{i}",
                start=start,
                end=end,
                decode_ms_per_block=decode_ms * float(rng.uniform(0.9, 1.3)),
                tokens_per_s_per_block=rate * float(rng.uniform(0.7, 1.1)),
                network_bytes_per_s=float(rng.choice([1.25e6, 6.25e6, 1.25e7, 1.25e8])),
                free_cache_tokens=8192,
                reputation=float(rng.uniform(0.5, 1.0)),
                price=float(rng.uniform(0.1, 2.0)) / decode_ms,
            )
        )

    def rtt_ms(one: int, others: np.ndarray) -> np.ndarray:
        away = np.hypot(*(places[others] - places[one]).T)
        return 1.0 + away * 1.5 / _FIBRE_KM_PER_MS + rng.exponential(4.0, size=away.shape)

    return _snapshot(servers, num_blocks, _table(num_servers, rtt_ms, rng, known))


SWARMS: dict[str, Callable[..., SwarmSnapshot]] = {"scattered": scattered, "geographic": geographic}


def _spans(
    rng: np.random.Generator, num_servers: int, num_blocks: int, longest: float
) -> list[tuple[int, int]]:
    """Spans of random length and place; the first ones tile the model, so that it is covered."""
    most = max(1, min(num_blocks, round(longest * num_blocks)))
    spans: list[tuple[int, int]] = []
    at = 0
    while at < num_blocks and len(spans) < num_servers:
        length = (
            most if len(spans) == num_servers - 1 else int(rng.integers(1 + most // 2, most + 1))
        )
        spans.append((at, min(num_blocks, at + length)))
        at += length
    if at < num_blocks:
        raise ValueError(f"{num_servers} servers of {most} blocks do not cover {num_blocks}")
    for _ in range(num_servers - len(spans)):
        length = int(rng.integers(1, most + 1))
        start = int(rng.integers(0, num_blocks - length + 1))
        spans.append((start, start + length))
    return [spans[i] for i in rng.permutation(num_servers)]


def _table(
    num_servers: int,
    rtt_ms: Callable[[int, np.ndarray], np.ndarray],
    rng: np.random.Generator,
    known: float,
) -> dict[str, dict[str, float]]:
    """The known pairs; `rtt_ms(i, others)` draws the times from one node to others."""
    names = [*(f"s{i}" for i in range(num_servers)), CLIENT]
    table: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        others = np.arange(i + 1, len(names))
        if known < 1.0:
            others = others[rng.random(len(others)) < known]
        times = rtt_ms(i, others).tolist()
        table[name] = {names[j]: time for j, time in zip(others, times, strict=True)}
    return {name: row for name, row in table.items() if row}


def _snapshot(
    servers: list[ServerPoint], num_blocks: int, rtt: dict[str, dict[str, float]]
) -> SwarmSnapshot:
    return SwarmSnapshot(
        num_blocks=num_blocks,
        activation_bytes_per_token=ACTIVATION_BYTES,
        hop_overhead_ms=2.0,
        default_rtt_ms=80.0,
        servers=tuple(servers),
        rtt_ms=rtt,
    )
