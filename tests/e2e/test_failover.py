"""Losing a server in the middle of a text changes no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streamers import StopServerAt

from planetserve import AutoDistributedModelForCausalLM
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.testing.swarm import LocalSwarm
from planetserve.wire.frame import FLAG_REPLAY, FrameHeader, FrameType

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


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
        streamer = StopServerAt(model, swarm, hop, after=5)
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


def _steps(swarm: LocalSwarm, server: str, way: str = "sent") -> list[FrameHeader]:
    """Headers of the step frames that a server has sent or received."""
    return [
        frame.header
        for frame in swarm.frames
        if (frame.node, frame.way, frame.header.type) == (server, way, FrameType.STEP)
    ]


def test_survivors_keep_what_they_have(
    llama_folder: Path, local: Any, prompt: torch.Tensor
) -> None:
    """The hop before the gap fills the new one; nobody else computes anything again."""
    spans = ["0:2", "2:4", "2:4", "4:6"]
    with (
        LocalSwarm(str(llama_folder), spans) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
    ):
        streamer = StopServerAt(model, swarm, hop=1, after=5)
        got = model.generate(prompt, **GREEDY, streamer=streamer)
        first, new, last = [hop.peer_id for hop in model.chain.hops]
        opened = [
            frame.node
            for frame in swarm.frames
            if (frame.way, frame.header.type) == ("received", FrameType.OPEN)
        ]
        filling = [item for item in _steps(swarm, first) if item.flags & FLAG_REPLAY]
        assert sorted(opened) == sorted([first, streamer.stopped, new, last])
        # The prompt and four tokens, or five if the server took the next step before it went.
        assert sum(item.num_tokens for item in filling) - prompt.shape[1] in (3, 4, 5)
        assert {item.epoch for item in filling} == {1}
        assert not [item for item in _steps(swarm, new) if item.flags & FLAG_REPLAY]
        assert len(_steps(swarm, last, way="received")) == GREEDY["max_new_tokens"]
    assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_two_neighbours_lost_at_once(llama_folder: Path, local: Any, prompt: torch.Tensor) -> None:
    spans = ["0:2", "2:3", "3:5", "5:6", "2:4", "4:6"]
    with (
        LocalSwarm(str(llama_folder), spans) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers
        ) as model,
    ):
        chain: list[str] = []

        def stop_two(*_: Any) -> None:
            if model.chain is None or len(chain) or model.chain.hops[0].end != 2:
                return
            chain.extend(hop.peer_id for hop in model.chain.hops[1:3])
            for server in [s for s in swarm.servers if s.node.peer_id in chain]:
                swarm.stop_server(server)

        model.register_forward_pre_hook(stop_two)
        got = model.generate(prompt, **GREEDY)
        assert len(chain) == 2
        assert not {hop.peer_id for hop in model.chain.hops} & set(chain)
    assert torch.equal(got, local.generate(prompt, **GREEDY))


def test_an_edge_that_carries_nothing_is_given_up(
    llama_folder: Path, local: Any, prompt: torch.Tensor, monkeypatch: Any
) -> None:
    """Both servers answer pings; frames from one to the other do not arrive."""
    options: dict[str, Any] = {"probe_after": 0.2, "stall_timeout": 0.5}
    with (
        LocalSwarm(str(llama_folder), ["0:3", "3:6", "0:3", "3:6"]) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            str(llama_folder), initial_peers=swarm.initial_peers, **options
        ) as model,
    ):
        send = FrameStream.send
        cut: list[tuple[str, str]] = []
        server_of = {server.node._streams: server.node.peer_id for server in swarm.servers}

        async def lossy(stream: FrameStream, header: FrameHeader, payload: Any = b"") -> None:
            way = (server_of.get(stream._table, "the client"), stream.remote)
            is_step = header.type is FrameType.STEP
            if not cut and is_step and (header.step, header.edge) == (3, 1):
                cut.append(way)
            if not (is_step and way in cut):
                await send(stream, header, payload)

        monkeypatch.setattr(FrameStream, "send", lossy)
        got = model.generate(prompt, **GREEDY)
        peers = [hop.peer_id for hop in model.chain.hops]
        assert cut
        assert cut[0] not in zip(peers, peers[1:], strict=False)
    assert torch.equal(got, local.generate(prompt, **GREEDY))
