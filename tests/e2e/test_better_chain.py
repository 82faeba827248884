"""A running session goes where it is clearly faster and stays where it is not; same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.engine.span_runner import SpanRunner
from planetserve.scheduler import speed
from planetserve.server.server import Server
from planetserve.testing.swarm import LocalSwarm
from planetserve.types import Chain

LOOKING: dict[str, Any] = {"replan_period": 0.05, "replan_checks": 2, "update_period": 0.2}
GREEDY: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False}


class AtEveryToken(BaseStreamer):
    """Calls back with the number of each new token."""

    def __init__(self, callback: Callable[[int], None]):
        self.callback, self.number = callback, -1

    def put(self, value: torch.Tensor) -> None:
        self.number += 1
        self.callback(self.number)

    def end(self) -> None:
        return


def slow_down(server: Server, seconds: float) -> None:
    """Make every pass of a server longer."""
    forward = server.engine.runner.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return forward(*arguments)

    server.engine.runner.forward = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("spans", [["0:3", "3:6"], ["0:6"]])
def test_a_session_moves_to_a_much_faster_server(
    llama_folder: Path,
    local: Any,
    prompt: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    spans: list[str],
) -> None:
    monkeypatch.setattr(speed, "_AVERAGE_S", 0.1)  # the load is known after a few steps
    with (
        LocalSwarm(str(llama_folder), spans) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers, **LOOKING
        ) as model,
    ):
        slow_down(swarm.servers[-1], 0.2)
        chains: list[Chain] = []
        joined: list[str] = []

        def at_token(number: int) -> None:
            chains.append(model.chain)
            if number == 12:
                joined.append(swarm.add_server(spans[-1]).node.peer_id)
                while joined[0] not in model.runtime._manager.view.servers:
                    time.sleep(0.01)

        got = model.generate(prompt, **GREEDY, streamer=AtEveryToken(at_token))
        assert chains[12].hops[-1].peer_id == swarm.servers[len(spans) - 1].node.peer_id
        assert model.chain.hops[-1].peer_id == joined[0]
        assert len({chain.hops for chain in chains}) == 2
        if len(spans) > 1:
            assert chains[12].hops[0] == model.chain.hops[0]
    assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_a_session_stays_among_equals(
    llama_folder: Path, local: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SpanRunner.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(0.04)
        return forward(*arguments)

    monkeypatch.setattr(SpanRunner, "forward", slow)
    looks = 0
    with (
        LocalSwarm(str(llama_folder), ["0:3", "0:3", "3:6", "3:6"]) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers, **LOOKING
        ) as model,
    ):
        find = model.runtime._manager.find_better

        async def counted(session: Any) -> Any:
            nonlocal looks
            looks += 1
            return await find(session)

        monkeypatch.setattr(model.runtime._manager, "find_better", counted)
        chains: list[Chain] = []
        got = model.generate(
            prompt, **GREEDY, streamer=AtEveryToken(lambda _: chains.append(model.chain))
        )
        assert looks > 5
        assert len({chain.hops for chain in chains[1:]}) == 1
    assert torch.equal(got, local.generate(prompt, **GREEDY))
