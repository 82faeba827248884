"""Which node sent which frame to which: activations travel the ring and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from planetserve.testing.swarm import LocalSwarm, SeenFrame
from planetserve.wire.frame import ANSWER_EDGE, FrameType
from planetserve.wire.step import HopLoad

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


def test_every_step_brings_the_hops_loads(
    model: Any, swarm: LocalSwarm, prompt: torch.Tensor
) -> None:
    with model.inference_session(max_length=32) as session:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        ring = session._core.ring
        assert set(ring.loads_ms) == {hop.peer_id for hop in ring.chain}
        assert all(0 < ms < 1000 for ms in ring.loads_ms.values())
        model.runtime._loop_thread.call(_say(ring))


async def _say(ring: Any) -> None:
    """Loads of hops that the client does not have, or in another order, change nothing."""
    before = ring.loads_ms
    edges = [link.edge for link in ring._hops.links]
    for claimed in ([], edges[1:], edges[::-1], [*edges, 9]):
        ring._note_loads([HopLoad(edge, 10**9) for edge in claimed])
        assert ring.loads_ms is before
    ring._note_loads([HopLoad(edge, 5000) for edge in edges])
    assert set(ring.loads_ms.values()) == {5.0}
