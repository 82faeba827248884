"""What one peer may hold and ask for, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging

import pytest

from planetserve.errors import ConfigError, QueueFull
from planetserve.server import limits, refusal_log
from planetserve.server.backpressure import PeerBackpressure, StepBackpressure
from planetserve.server.limits import Admission, QueuedBytes, ServerLimits
from planetserve.server.refusal_log import RefusalLog
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


def test_hoards_leave_room_for_the_first_frames_of_others_within_the_whole() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=100, max_peer_queued_bytes=60))
    assert queued.take("a", 40)
    assert queued.take("b", 30)
    assert not queued.take("a", 10), "a quarter is for those who have nothing queued"
    assert queued.take("c", 30)
    for number in range(50):
        assert not queued.take(f"peer {number}", 10), "peer ids cost nothing"
    assert queued.total == 100


def test_where_nothing_is_queued_a_frame_of_any_size_passes() -> None:
    queued = QueuedBytes(ServerLimits(max_queued_bytes=100, max_peer_queued_bytes=10))
    assert queued.take("a", 500)
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
    gate = StepBackpressure(
        QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10))
    )
    await gate.enter("a", 7)
    waiting = [asyncio.create_task(gate.enter("a", 4)) for _ in range(2)]
    await gate.enter("b", 2)
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert not waiting[1].done()
    gate.leave("a", 7)
    await waiting[1]
    assert gate.queued.of("a") == 4
    gate.leave("a", 4)
    gate.leave("b", 2)
    assert gate.queued.total == 0


async def test_what_another_peer_leaves_lets_in_who_waited_for_the_whole() -> None:
    gate = StepBackpressure(
        QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10))
    )
    await gate.enter("a", 10)
    waiting = asyncio.create_task(gate.enter("b", 4))
    await asyncio.sleep(0)
    gate.leave("a", 10)
    await waiting
    assert gate.queued.total == 4


async def test_who_is_let_in_and_cancelled_at_once_holds_nothing() -> None:
    gate = StepBackpressure(
        QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10))
    )
    await gate.enter("a", 10)
    waiting = asyncio.create_task(gate.enter("b", 4))
    await asyncio.sleep(0)
    gate.leave("a", 10)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert gate.queued.total == 0
    assert not gate._waiting


async def test_a_session_that_ends_gives_back_what_it_has_in_the_gate() -> None:
    gate = StepBackpressure(
        QueuedBytes(ServerLimits(max_queued_bytes=10, max_peer_queued_bytes=10))
    )
    share = PeerBackpressure(gate, "a")
    await share.enter(6)
    share.close()
    share.leave(6)  # by whoever still held some
    share.close()
    assert gate.queued.total == 0
    await share.enter(3)
    assert gate.queued.total == 0


def test_refusals_are_counted_and_logged_at_a_bounded_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    refusals = RefusalLog(clock)
    with caplog.at_level(logging.INFO, logger="planetserve.server.refusal_log"):
        for _ in range(1000):
            refusals.add("open.queue_full", "peer-a")
        refusals.add("frame", "peer-b")
        clock.now_s += refusal_log.LOG_PERIOD_S
        refusals.add("frame", "peer-a")
    assert refusals.counts == {"open.queue_full": 1000, "frame": 2}
    assert caplog.messages == [
        "refused from …peer-a: open.queue_full x1",
        "refused from …peer-b: frame x1",
        "refused from …peer-a: open.queue_full x999, frame x1",
    ]


def test_so_many_peers_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_log, "MAX_PEERS", 10)
    refusals = RefusalLog(ManualClock())
    for number in range(100):
        refusals.add("frame", f"peer {number}")
    assert len(refusals._peers) == 10
    assert refusals.counts["frame"] == 100
