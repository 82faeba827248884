"""Losing a server in the middle of a text changes no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.testing.swarm import LocalSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


class _StopServerAt(BaseStreamer):
    """Closes the server of one hop after some tokens."""

    def __init__(self, model: Any, swarm: LocalSwarm, hop: int, after: int):
        self.model, self.swarm, self.hop, self.after = model, swarm, hop, after
        self.stopped: str | None = None

    def put(self, value: torch.Tensor) -> None:
        self.after -= 1
        if self.after == 0:
            self.stopped = self.model.chain.hops[self.hop].peer_id
            (server,) = [s for s in self.swarm.servers if s.node.peer_id == self.stopped]
            self.swarm.stop_server(server)

    def end(self) -> None:
        return


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_tokens_survive_a_lost_hop(
    llama_folder: Path, local: Any, prompt: torch.Tensor, hop: int
) -> None:
    spans = ["0:2", "0:2", "2:4", "2:4", "4:6", "4:6"]
    with (
        LocalSwarm(str(llama_folder), spans) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
    ):
        streamer = _StopServerAt(model, swarm, hop, after=5)
        got = model.generate(prompt, **GREEDY, streamer=streamer)
        assert streamer.stopped is not None
        assert streamer.stopped not in [item.peer_id for item in model.chain.hops]
    assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_beams_survive_a_lost_hop(
    llama_folder: Path, local: Any, padded: dict[str, torch.Tensor], monkeypatch: Any
) -> None:
    options = {**GREEDY, "num_beams": 3, "pad_token_id": 0}
    with (
        LocalSwarm(str(llama_folder), ["0:3", "3:6", "0:6"]) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
    ):
        calls = 0

        def stop_at_fourth(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                lost = model.chain.hops[0].peer_id
                (server,) = [s for s in swarm.servers if s.node.peer_id == lost]
                swarm.stop_server(server)

        model.register_forward_pre_hook(stop_at_fourth)
        got = model.generate(**padded, **options)
        assert calls > 4
    assert torch.equal(got, local.generate(**padded, **options))
