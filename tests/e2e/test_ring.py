"""Which node sent which frame to which: activations travel the ring and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from planetserve.testing.swarm import LocalSwarm, SeenFrame
from planetserve.wire.frame import ANSWER_EDGE, FrameType

CLIENT = "client"


def _run(model: Any, swarm: LocalSwarm, ids: torch.Tensor, num_tokens: int) -> list[SeenFrame]:
    seen: list[SeenFrame] = []
    node = model.runtime.node
    me = node.peer_id
    swarm.frames.clear()

    def tap(way: str, remote: str, header: Any) -> None:
        seen.append(SeenFrame(me, way, remote, header))

    node.taps.append(tap)
    try:
        model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    finally:
        node.taps.remove(tap)
    return seen


def test_steps_go_around_the_ring(model: Any, swarm: LocalSwarm, prompt: torch.Tensor) -> None:
    mine = _run(model, swarm, prompt, num_tokens=4)
    hops = [hop.peer_id for hop in model.chain.hops]
    assert len(hops) >= 3
    me = model.runtime.node.peer_id
    # Prefill and three decode steps (the last token is sampled, not fed).
    ring = [*zip([me, *hops], [*hops, me], strict=True)]
    received = [
        (frame.remote, frame.node, frame.header.step, frame.header.edge)
        for frame in [*swarm.frames, *mine]
        if frame.way == "received" and frame.header.type is FrameType.STEP
    ]
    expected = [
        (sender, receiver, step, edge)
        for step in range(4)
        for edge, (sender, receiver) in zip([*range(len(hops)), ANSWER_EDGE], ring, strict=True)
    ]
    assert sorted(received) == sorted(expected)


def test_client_hears_nothing_from_the_middle(
    model: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    mine = _run(model, swarm, prompt, num_tokens=3)
    hops = [hop.peer_id for hop in model.chain.hops]
    steps = [frame for frame in mine if frame.header.type is FrameType.STEP]
    assert {frame.remote for frame in steps if frame.way == "sent"} == {hops[0]}
    assert {frame.remote for frame in steps if frame.way == "received"} == {hops[-1]}
    middle = [frame for frame in mine if frame.way == "received" and frame.remote in hops[1:-1]]
    assert {frame.header.type for frame in middle} <= {FrameType.OPENED, FrameType.PONG}


def test_prefill_answers_with_the_last_token_only(
    model: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    mine = _run(model, swarm, prompt, num_tokens=1)
    answers = [
        frame.header
        for frame in mine
        if frame.way == "received" and frame.header.type is FrameType.STEP
    ]
    assert [header.num_tokens for header in answers] == [prompt.shape[1]]
    assert [header.shape[0] for header in answers] == [1]
