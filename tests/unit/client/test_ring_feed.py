"""What is sent into a ring, and when: chunks in order, behind what fills a first hop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from planetserve.client.ring import hop_connection
from planetserve.client.ring.hop_connection import HopFailure
from planetserve.client.ring.ring_feed import RingFeed
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.client.ring.ring_step import RingStep
from planetserve.edge.chunk import StepChunk
from planetserve.errors import StreamClosed
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY
from planetserve.wire.step import MAX_CHUNKS_IN_FLIGHT, RowSlice, StepTable

WIDTH = 4
SPEC = RingSpec(
    num_rows=1, max_length=64, hidden_size=WIDTH, dtype=torch.float32, connect_timeout_s=1.0,
    step_timeout_s=1.0, stall_timeout_s=1.0, probe_after_s=1.0, ping_timeout_s=1.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def hops_get_chunks_as_small_as_they_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_connection, "LEAST_CHUNK_TOKENS", 1)
    monkeypatch.setattr(hop_connection, "ENOUGH_CHUNK_TOKENS", 1)


class Sent:
    """A ring of hops with the client's sender and the first hop's stream, which only take note of
    what is sent."""

    def __init__(self, *max_chunk_tokens: int):
        self.links = [
            SimpleNamespace(
                max_chunk_tokens=tokens, stream=self, peer_id="hop", ended=asyncio.Event()
            )
            for tokens in max_chunk_tokens
        ]
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.chunks: list[tuple[int, int, int, list[float]]] = []
        """Step, chunk, flags and the first number of each token."""
        self.error: StreamClosed | None = None
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.feed = RingFeed(SPEC, self, self, self.inbox)  # type: ignore[arg-type]

    def seal(self, chunk: StepChunk, _now_s: float) -> tuple[StepChunk, bytes]:
        return chunk, b""

    async def send(self, chunk: StepChunk, _payload: bytes) -> None:
        await self.may_send.wait()
        assert len(chunk.hidden_TD) == chunk.table.num_tokens
        if self.error is not None:
            raise self.error
        self.chunks.append((chunk.step, chunk.chunk, chunk.flags, chunk.hidden_TD[:, 0].tolist()))

    def step(self, number: int, num_tokens: int, *, keep_last: bool = False) -> RingStep:
        return self.feed.new_step(number, *piece(0, num_tokens), keep_last=keep_last)


def piece(start: int, num_tokens: int) -> tuple[StepTable, torch.Tensor]:
    numbers = torch.arange(start, start + num_tokens, dtype=torch.float32)
    return StepTable((RowSlice(0, start, num_tokens),)), numbers[:, None].expand(-1, WIDTH)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_chunks_are_as_long_as_the_narrowest_hop_takes() -> None:
    sent = Sent(5, 3)
    await sent.feed.send(sent.step(7, 8, keep_last=True))
    await settle()
    assert sent.chunks == [
        (7, 0, FLAG_KEEP_LAST, [0.0, 1.0, 2.0]),
        (7, 1, FLAG_KEEP_LAST, [3.0, 4.0, 5.0]),
        (7, 2, FLAG_KEEP_LAST, [6.0, 7.0]),
    ]


@pytest.mark.parametrize(
    ("wishes", "tokens"),
    [
        ([512, 512], 512),
        ([512, 200], 200),
        ([1, 512], 64),
        ([1], 16),
        ([16, 16], 16),
        ([1, 20], 20),
    ],
)
def test_a_hop_that_wishes_for_little_does_not_make_a_prompt_slow(
    monkeypatch: pytest.MonkeyPatch, wishes: list[int], tokens: int
) -> None:
    monkeypatch.undo()
    links: Any = [SimpleNamespace(max_chunk_tokens=wish) for wish in wishes]
    assert hop_connection.chunk_tokens(links) == tokens


async def test_a_small_step_is_sent_before_send_returns() -> None:
    sent = Sent(64)
    await sent.feed.send(sent.step(3, 1))
    assert sent.chunks == [(3, 0, 0, [0.0])]


async def test_a_small_step_waits_behind_what_is_under_way() -> None:
    sent = Sent(2)
    sent.may_send.clear()
    await sent.feed.send(sent.step(1, 4))
    await sent.feed.send(sent.step(2, 1))
    assert sent.chunks == []
    sent.may_send.set()
    await settle()
    assert [(step, chunk) for step, chunk, *_ in sent.chunks] == [(1, 0), (1, 1), (2, 0)]


async def test_only_so_many_chunks_are_on_their_way() -> None:
    sent = Sent(1)
    step = sent.step(1, MAX_CHUNKS_IN_FLIGHT + 2)
    await sent.feed.send(step)
    await settle()
    assert len(sent.chunks) == MAX_CHUNKS_IN_FLIGHT
    step.take(torch.zeros(1, WIDTH))
    await settle()
    assert len(sent.chunks) == MAX_CHUNKS_IN_FLIGHT + 1


async def test_a_new_first_hop_is_filled_before_the_step_goes_on() -> None:
    sent = Sent(2)
    sent.feed.send_again(piece(10, 3), sent.step(5, 2), replayed_step=4)
    await settle()
    assert sent.chunks == [
        (4, 0, FLAG_REPLAY, [10.0, 11.0]),
        (4, 1, FLAG_REPLAY, [12.0]),
        (5, 0, 0, [0.0, 1.0]),
    ]


async def test_nothing_is_sent_after_stop() -> None:
    sent = Sent(1)
    sent.may_send.clear()
    await sent.feed.send(sent.step(1, 3))
    await settle()
    await sent.feed.stop()
    await sent.feed.stop()
    sent.may_send.set()
    await settle()
    assert sent.chunks == []


async def test_failures_of_what_is_sent_meanwhile_reach_the_inbox() -> None:
    sent = Sent(1)
    sent.error = StreamClosed("gone")
    await sent.feed.send(sent.step(1, 3))
    await settle()
    assert await sent.inbox.get() == HopFailure(sent.links[0], sent.error)
    with pytest.raises(StreamClosed):
        await sent.feed.send(sent.step(2, 1))
