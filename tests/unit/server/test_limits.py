"""What one peer may hold and ask for, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging

import pytest

from planetserve.errors import ConfigError, QueueFull
from planetserve.server import counters, limits
from planetserve.server.counters import Refusals
from planetserve.server.gate import StepGate
from planetserve.server.limits import Admission, QueuedBytes, ServerLimits
from planetserve.testing.clock import ManualClock


def asked(admission: Admission, peer: str) -> float:
    """0 if the peer may open a session, else when it may ask again."""
    try:
        admission.ask(peer)
    except QueueFull as refusal:
        return refusal.retry_after_s
    return 0.0


def test_refused_attempts_count_and_say_when_to_come_back() -> None:
    clock = ManualClock()
    admission = Admission(ServerLimits(max_peer_opens=60, peer_open_burst=2), clock)
    assert [asked(admission, "a") for _ in range(3)] == [0, 0, 1.0]
    assert asked(admission, "b") == 0
    clock.now_s += 1.0
    assert asked(admission, "a") == 0


def test_sessions_of_one_peer_and_of_all_are_bounded() -> None:
    admission = Admission(ServerLimits(max_sessions=3, max_peer_sessions=2), ManualClock())
    for peer in ("a", "a"):
        admission.ask(peer)
        admission.opened(peer)
    with pytest.raises(QueueFull, match="max_peer_sessions"):
        admission.ask("a")
    admission.ask("b")
    admission.opened("b")
    with pytest.raises(QueueFull, match="--max_sessions"):
        admission.ask("c")
    admission.closed("a")
    admission.ask("a")


@pytest.mark.parametrize("name", ["max_sessions", "max_peer_opens", "max_queued_bytes"])
def test_limits_that_nothing_passes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="positive"):
        ServerLimits(**{name: 0})


def test_queued_bytes_are_bounded_per_peer_and_in_all() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=100, max_peer_queued_bytes=60))
    assert queued.take("a", 40)
    assert not queued.take("a", 30)
    assert queued.take("a", 20)
    assert queued.take("b", 40)
    assert not queued.take("b", 1)
    queued.give("a", 60)
    assert queued.take("b", 20)
    assert (queued.total, queued.of("a"), queued.of("b")) == (60, 0, 60)


def test_nobodys_hoard_stops_the_first_frame_of_another() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=100, max_peer_queued_bytes=100))
    assert queued.take("a", 100)
    assert queued.take("b", 500), "a peer with nothing queued may queue one frame of any size"
    assert not queued.take("b", 1)


def test_a_stuck_prompt_does_not_stop_the_decoding_of_another_session() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=1000, max_peer_queued_bytes=100))
    assert queued.take("a", 100)
    assert not queued.take("a", 1)
    assert queued.take("a", limits.SMALL_FRAME_BYTES, is_only=True)
    assert not queued.take("a", limits.SMALL_FRAME_BYTES + 1, is_only=True)


def test_the_rest_of_a_begun_step_is_counted_in_any_case() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10))
    assert queued.take("a", 10)
    assert queued.take("a", 10, must=True)
    assert queued.total == 20


async def test_the_gate_opens_when_there_is_room_again() -> None:
    gate = StepGate(QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10)))
    await gate.enter("a", 8)
    waiting = [asyncio.create_task(gate.enter("a", 4)) for _ in range(2)]
    await gate.enter("b", 2)
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert not waiting[1].done()
    gate.leave("a", 8)
    await waiting[1]
    assert gate.queued.of("a") == 4
    gate.leave("a", 4)
    gate.leave("b", 2)
    assert gate.queued.total == 0


def test_refusals_are_counted_and_logged_at_a_bounded_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    refusals = Refusals(clock)
    with caplog.at_level(logging.INFO, logger="planetserve.server.counters"):
        for _ in range(1000):
            refusals.add("open.queue_full", "peer-a")
        refusals.add("frame", "peer-b")
        clock.now_s += counters.LOG_PERIOD_S
        refusals.add("frame", "peer-a")
    assert refusals.counts == {"open.queue_full": 1000, "frame": 2}
    assert caplog.messages == [
        "refused from …peer-a: open.queue_full x1",
        "refused from …peer-b: frame x1",
        "refused from …peer-a: open.queue_full x999, frame x1",
    ]


def test_so_many_peers_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "MAX_PEERS", 10)
    refusals = Refusals(ManualClock())
    for number in range(100):
        refusals.add("frame", f"peer {number}")
    assert len(refusals._peers) == 10
    assert refusals.counts["frame"] == 100
