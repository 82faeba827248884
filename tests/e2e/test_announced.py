"""What servers measure of themselves and of each other reaches the client's plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from planetserve import AutoDistributedModelForCausalLM
from planetserve.client.planning.chain_manager import ChainManager
from planetserve.routing.optimizers.shortest_path import ShortestPath
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.testing.swarm import LocalSwarm
from planetserve.types import CLIENT


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody signals; the test's timeout is the limit."""
    while not condition():
        time.sleep(0.05)


def test_a_plan_is_made_of_measurements(
    tmp_path: Path, llama_folder: Path, local: Any, prompt: torch.Tensor
) -> None:
    options = {"update_period": 0.5, "network_mbps": 8.0}
    with (
        LocalSwarm(str(llama_folder), ["0:3", "3:6"], options) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers, update_period=0.5
        ) as model,
    ):
        manager: ChainManager = model.runtime._manager
        first, second = (server.node.peer_id for server in swarm.servers)
        until(lambda: manager.snapshot().rtt(first, second) != manager.snapshot().default_rtt_ms)
        until(lambda: set(manager.snapshot().rtt_ms.get(CLIENT, ())) == {first, second})
        snapshot = manager.snapshot()
        assert 0 < snapshot.rtt(first, second) < snapshot.default_rtt_ms
        # On a fast machine it is the least that is announced.
        assert snapshot.hop_overhead_ms >= 0.5
        for server in snapshot.servers:
            assert server.network_bytes_per_s == 1e6
            assert 0 < server.decode_ms_per_block < 1000
            assert server.tokens_per_s_per_block > 0
        model.save_snapshot(tmp_path / "swarm.json")
        saved = SwarmSnapshot.load(tmp_path / "swarm.json")
        assert {server.id for server in saved.servers} == {first, second}
        chain = ShortestPath().plan(saved, ChainRequest(tokens=1))
        assert [hop.peer_id for hop in chain] == [first, second]
        assert torch.equal(
            model.generate(prompt, max_new_tokens=3, do_sample=False),
            local.generate(prompt, max_new_tokens=3, do_sample=False),
        )
