"""Whose fault a wrong answer is: what the last hop makes itself, and what it only passes on."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from planetserve.client.ring.ring_step import RingStep
from planetserve.crypto.channel import EdgeSealer
from planetserve.edge.chunk import StepChunk
from planetserve.edge.receiver import StepReceiver
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import ANSWER_EDGE, Direction, FrameHeader, FrameType, WireDtype
from planetserve.wire.step import RowSlice, StepTable, pack_answer_head

WIDTH = 4
SESSION = bytes(range(16))
TABLE = StepTable((RowSlice(0, 0, 3),))


def opened(
    keep_last: bool = False, num_tokens: int = 3, value: float = 1.0, **changes: Any
) -> torch.Tensor | None:
    """What the client makes of a well sealed answer to step 5, of tokens 0, 1, 2 times `value`."""
    secret = bytearray(range(32))
    sealer = EdgeSealer(
        bytearray(secret), SESSION, ANSWER_EDGE, 0, Direction.FORWARD, time.monotonic()
    )
    receiver = StepReceiver(SESSION, ANSWER_EDGE, WIDTH, torch.float32, num_rows=1)
    receiver.start(secret, 0)
    hidden_TD = torch.zeros(3, WIDTH)
    step = RingStep(5, [StepChunk(5, 0, 1, 0, TABLE, hidden_TD)], hidden_TD, keep_last)
    answer_TD = value * torch.arange(num_tokens, dtype=torch.float32)[:, None].expand(-1, WIDTH)
    header = FrameHeader(
        FrameType.STEP, session=SESSION, edge=ANSWER_EDGE, step=5, num_tokens=3,
        dtype=WireDtype.FLOAT32, shape=tuple(answer_TD.shape),
    )  # fmt: skip
    header = dataclasses.replace(header, **changes)
    parts = [pack_answer_head(()), answer_TD.contiguous().numpy().tobytes()]
    header, sealed = sealer.seal(header, parts, time.monotonic())
    chunk = receiver.open(header, bytearray(sealed), step, "last")
    if chunk is None:
        return None
    step.take(chunk.hidden_TD)
    return step.output_TD


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 14},
        {"chunk": 1, "num_chunks": 2},
        {"num_tokens": 2},
        {"num_tokens": 1},
        {"keep_last": True, "num_tokens": 2},
    ],
)
def test_what_the_last_hop_passes_on_is_not_its_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        opened(**changes)
    assert caught.value.peer_id is None


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": WireDtype.FLOAT16},
        {"shape": (3, WIDTH + 1)},
        {"shape": (WIDTH, 3)},
        {"shape": (1, 3, WIDTH)},
        {"value": float("nan")},
        {"value": float("inf")},
    ],
)
def test_what_the_last_hop_makes_is_its_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        opened(**changes)
    assert caught.value.peer_id == "last"


def test_an_answer_of_all_tokens_serves_one_who_wanted_the_last() -> None:
    last_TD = opened(keep_last=True)
    assert last_TD is not None
    assert last_TD[:, 0].tolist() == [0.0, 0.0, 2.0]
    assert opened(step=4) is None
