"""Whether the blocks can be assigned within the limits: maximum bipartite matching with capacities.

It ignores costs and the limits on visits. A "no" is a proof; a "yes" comes with an assignment.
"""

from __future__ import annotations

from planetserve.routing.run_graph import Limits, RunGraph


def assign_blocks(graph: RunGraph, limits: Limits) -> tuple[int, ...] | None:
    """A host per block that keeps the limits on blocks; None proves that there is none."""
    load: list[list[int]] = [[] for _ in limits.blocks]
    host: dict[int, int] = {}
    room = limits.blocks.tolist()
    holders = [[s for s in row.tolist() if room[s] > 0] for row in graph.holders]
    for block in range(len(holders)):
        if not _place(block, holders, room, load, host):
            return None
    return tuple(host[block] for block in range(len(holders)))


def _place(
    block: int,
    holders: list[list[int]],
    room: list[int],
    load: list[list[int]],
    host: dict[int, int],
) -> bool:
    """Breadth-first search for an augmenting path that starts at `block`."""
    came: dict[int, tuple[int, int]] = {}  # server -> (block that wants it, server it would leave)
    queue = [(block, -1)]
    for wanting, leaving in queue:
        for server in holders[wanting]:
            if server in came:
                continue
            came[server] = (wanting, leaving)
            if len(load[server]) < room[server]:
                _shift(server, came, load, host)
                return True
            queue.extend((other, server) for other in load[server])
    return False


def _shift(
    server: int,
    came: dict[int, tuple[int, int]],
    load: list[list[int]],
    host: dict[int, int],
) -> None:
    while server != -1:
        block, leaving = came[server]
        if leaving != -1:
            load[leaving].remove(block)
        load[server].append(block)
        host[block] = server
        server = leaving
