"""Servers that are started at once, as a script or a cluster does."""

from __future__ import annotations

from pathlib import Path

from planetserve.testing.swarm import LocalSwarm


def test_servers_that_start_together_take_all_blocks(llama_folder: Path) -> None:
    with LocalSwarm(str(llama_folder), []) as swarm:
        wanted = {"block_indices": None, "num_blocks": 2}
        servers = swarm.add_servers([("0:1", wanted)] * 3)
        assert sorted(str(server.span) for server in servers) == ["0:2", "2:4", "4:6"]
