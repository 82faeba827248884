"""A plan as a picture: the front with the picked chain, and the chain on a map of the servers.

A snapshot knows no places, so the map is made of round-trip times by classical multidimensional
scaling (Torgerson, 1952): on the page, far apart means a long round trip, as well as two dimensions
can show it. Large swarms are thinned out. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np

from planetserve.errors import ConfigError
from planetserve.plan.report import short_name
from planetserve.plan.solving import Plan
from planetserve.routing.arrays import FloatArray
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import CLIENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_SHOWN = 300
"""Servers on the map besides those of the chain."""
_MAX_NAMED = 12


def require_matplotlib() -> None:
    """Check before planning that a picture can be drawn after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'planetserve[plot]'")


def draw(plan: Plan, path: str) -> None:
    """Write the picture of `plan` as a PNG file, whatever its name ends in.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_front(left, plan)
    _draw_map(right, plan)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"cannot write --plot {path!r}: {error.strerror}") from error


def _draw_front(axes: Axes, plan: Plan) -> None:
    latency = [chain.latency_ms for chain in plan.chains]
    throughput = [chain.throughput_tokens_per_s for chain in plan.chains]
    axes.plot(latency, throughput, "o", markersize=4, color="tab:blue", label=plan.optimizer)
    axes.plot(
        plan.chain.latency_ms,
        plan.chain.throughput_tokens_per_s,
        "*",
        markersize=16,
        color="tab:red",
        label=f"picked, {len(plan.chain)} hops",
    )
    axes.set(xlabel="latency, ms per token", ylabel="throughput, tokens/s", title="chains")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _draw_map(axes: Axes, plan: Plan) -> None:
    snapshot, chain = plan.snapshot, plan.chain
    used = list(dict.fromkeys(hop.peer_id for hop in chain))
    shown = _shown(snapshot, used)
    places = dict(zip(shown, _places(snapshot, shown), strict=True))
    others = [name for name in shown if name != CLIENT]
    middles = [(s.start + s.end) / 2 for s in (snapshot.servers[snapshot.index[n]] for n in others)]
    x, y = np.array([places[name] for name in others]).T
    dots = axes.scatter(
        x, y, c=middles, cmap="viridis", vmin=0, vmax=snapshot.num_blocks, s=25, alpha=0.7,
    )  # fmt: skip
    axes.figure.colorbar(dots, ax=axes, label="middle of the blocks held")
    ring = [CLIENT, *(hop.peer_id for hop in chain), CLIENT]
    for one, other in zip(ring, ring[1:], strict=False):
        axes.annotate(
            "", places[other], places[one],
            arrowprops={"arrowstyle": "->", "color": "tab:red", "shrinkA": 4, "shrinkB": 4},
        )  # fmt: skip
    axes.plot(*places[CLIENT], "s", color="tab:red", markersize=9)
    axes.annotate("client", places[CLIENT], xytext=(6, 6), textcoords="offset points")
    for number, server_id in enumerate(used[:_MAX_NAMED]):
        visits = [(i, hop) for i, hop in enumerate(chain, start=1) if hop.peer_id == server_id]
        spans = ", ".join(f"{i}. {hop.start}:{hop.end}" for i, hop in visits)
        axes.annotate(
            f"{short_name(server_id)}: {spans}".replace("$", r"\$"), places[server_id],
            xytext=(6, -3 - 9 * (number % 2)), textcoords="offset points", fontsize="small",
        )  # fmt: skip
    title = "the chain among the servers; distance is round-trip time"
    if len(shown) <= len(snapshot.servers):
        title += f"\n({len(others)} of {len(snapshot.servers)} servers shown)"
    axes.set_title(title)
    axes.set(xlabel="ms", ylabel="ms")
    axes.set_aspect("equal", adjustable="datalim")


def _shown(snapshot: SwarmSnapshot, used: list[str]) -> list[str]:
    """The client, the servers of the chain, and others evenly out of the rest."""
    chosen = set(used)
    rest = [server.id for server in snapshot.servers if server.id not in chosen]
    step = max(1, -(-len(rest) // _MAX_SHOWN))
    return [CLIENT, *used, *rest[::step]]


def _places(snapshot: SwarmSnapshot, names: list[str]) -> FloatArray:
    """`[names, 2]` points whose distances are about the round-trip times, the client at 0, 0."""
    rtt = np.array([[snapshot.rtt(one, other) for other in names] for one in names])
    squares = rtt**2
    inner = squares.mean(axis=0) + squares.mean(axis=1)[:, None] - squares - squares.mean()
    values, vectors = np.linalg.eigh(inner / 2)
    # The client and at least one server are there, so there are two dimensions.
    places: FloatArray = vectors[:, :-3:-1] * np.sqrt(np.clip(values[:-3:-1], 0.0, None))
    places -= places[0].copy()
    return places
