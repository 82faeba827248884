"""Whose fault a wrong answer is: what the last hop makes itself, and what it only passes on."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from planetserve.client.ring.ring_ends import RingEnds, RingStep
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.crypto.channel import EdgeSealer
from planetserve.errors import RemoteProtocolError
from planetserve.wire.frame import ANSWER_EDGE, Direction, FrameHeader, FrameType, WireDtype
from planetserve.wire.step import RowSlice, StepTable, pack_answer_head

WIDTH = 4
SESSION = bytes(range(16))
SPEC = RingSpec(
    num_rows=1, max_length=64, hidden_size=WIDTH, dtype=torch.float32, connect_timeout_s=1.0,
    step_timeout_s=1.0, stall_timeout_s=1.0, probe_after_s=1.0, ping_timeout_s=1.0,
)  # fmt: skip
TABLE = StepTable((RowSlice(0, 0, 3),))


def opened(
    keep_last: bool = False, num_tokens: int = 3, value: float = 1.0, **changes: Any
) -> torch.Tensor | None:
    """What the client makes of a well sealed answer to step 5, of tokens 0, 1, 2 times `value`."""
    ends = RingEnds(SESSION, SPEC)
    secret = bytearray(range(32))
    sealer = EdgeSealer(
        bytearray(secret), SESSION, ANSWER_EDGE, 0, Direction.FORWARD, time.monotonic()
    )
    ends.start_receiving(secret, 0)
    step = RingStep(5, (TABLE,), torch.zeros(3, WIDTH), keep_last)
    answer_TD = value * torch.arange(num_tokens, dtype=torch.float32)[:, None].expand(-1, WIDTH)
    header = FrameHeader(
        FrameType.STEP, session=SESSION, edge=ANSWER_EDGE, step=5, num_tokens=3,
        dtype=WireDtype.FLOAT32, shape=tuple(answer_TD.shape),
    )  # fmt: skip
    header = dataclasses.replace(header, **changes)
    parts = [pack_answer_head(()), answer_TD.contiguous().numpy().tobytes()]
    header, sealed = sealer.seal(header, parts, time.monotonic())
    answer = ends.open(step, header, bytearray(sealed), "last")
    return None if answer is None else answer[0]


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
    assert last_TD[:, 0].tolist() == [2.0]
    assert opened(step=4) is None
