"""Passes wait for decode steps only where that saves more than it costs."""

from __future__ import annotations

import pytest

from planetserve.scheduler.batch_delay import BatchDelay, LineFit
from planetserve.types import BlockSpan

ALL = BlockSpan(0, 10)
FIXED_S, TOKEN_S = 0.010, 0.0005
A, B, C = b"a", b"b", b"c"


def pass_s(num_tokens: float) -> float:
    return FIXED_S + TOKEN_S * num_tokens


def make(away_s: dict[bytes, float], patience: float = 1.0, span: BlockSpan = ALL) -> BatchDelay:
    """One that has seen passes, and sessions that come back after this long a time."""
    batch_delay = BatchDelay(patience)
    for num_tokens in (1, 2, 4, 8):
        batch_delay.record(num_tokens, len(ALL), pass_s(num_tokens))
    for session_id, away in away_s.items():
        batch_delay.open(session_id, span)
        for turn in range(12):
            batch_delay.answered([session_id], float(turn), TOKEN_S / len(ALL))
            batch_delay.returned(session_id, turn + away)
    return batch_delay


def answer(batch_delay: BatchDelay, session_id: bytes, now_s: float) -> None:
    batch_delay.answered([session_id], now_s, TOKEN_S / len(ALL))


def test_waits_for_who_comes_back_sooner_than_a_pass_takes():
    batch_delay = make({A: 0.004, B: 0.004})
    answer(batch_delay, B, 100.0)
    assert batch_delay.wait_s({A}, 100.0) == pytest.approx(0.004, abs=0.001)
    batch_delay.returned(B, 100.003)
    assert batch_delay.wait_s({A, B}, 100.003) == 0


def test_does_not_wait_for_who_stays_away_longer():
    batch_delay = make({A: 0.004, B: 0.011})
    answer(batch_delay, B, 100.0)
    assert batch_delay.wait_s({A}, 100.0) == 0


@pytest.mark.parametrize(("patience", "waits"), [(0.0, False), (0.3, False), (1.0, True)])
def test_patience_says_how_much_waiting_may_cost(patience, waits):
    batch_delay = make({A: 0.004, B: 0.004}, patience)
    answer(batch_delay, B, 100.0)
    assert (batch_delay.wait_s({A}, 100.0) > 0) == waits


def test_who_is_late_is_waited_for_no_longer():
    batch_delay = make({A: 0.004, B: 0.004})
    answer(batch_delay, B, 100.0)
    assert batch_delay.wait_s({A}, 100.002) > 0
    assert batch_delay.wait_s({A}, 100.011) == 0


def test_an_irregular_session_is_never_waited_for_longer_than_a_pass_saves():
    batch_delay = make({A: 0.004})
    batch_delay.open(B, ALL)
    for turn in range(40):
        answer(batch_delay, B, float(turn))
        batch_delay.returned(B, turn + (0.001 if turn % 2 else 0.015))
    answer(batch_delay, B, 100.0)
    assert batch_delay.wait_s({A}, 100.0) <= FIXED_S * 1.01


def test_a_pause_of_a_session_does_not_count_as_its_way_back():
    batch_delay = make({A: 0.004, B: 0.004})
    answer(batch_delay, B, 100.0)
    batch_delay.returned(B, 130.0)
    answer(batch_delay, B, 130.1)
    assert batch_delay.wait_s({A}, 130.1) == pytest.approx(0.004, abs=0.001)


def test_nobody_waits_for_new_sessions_or_for_those_that_are_gone():
    batch_delay = make({A: 0.004, B: 0.004})
    batch_delay.open(C, ALL)
    answer(batch_delay, C, 100.0)
    answer(batch_delay, B, 100.0)
    batch_delay.forget(B)
    answer(batch_delay, B, 100.0)
    assert batch_delay.wait_s({A}, 100.0) == 0


def test_a_session_with_a_further_step_here_waits_for_nobody():
    batch_delay = make({A: 0.004})
    answer(batch_delay, A, 100.0)
    assert batch_delay.wait_s({A}, 100.0) == 0


def test_only_shared_blocks_count():
    batch_delay = make({A: 0.004}, span=BlockSpan(0, 8))
    other = make({B: 0.004}, span=BlockSpan(6, 10))
    batch_delay._sessions.update(other._sessions)
    answer(batch_delay, A, 100.0)
    assert batch_delay.wait_s({B}, 100.0) == 0, "two shared blocks save 2 ms"
    batch_delay.open(C, BlockSpan(2, 8))
    assert batch_delay.wait_s({C}, 100.0) > 0, "six save 6 ms"


def test_does_not_wait_where_being_answered_together_makes_the_way_back_long():
    """One client needs 3 ms for each of its sessions, one after the other."""
    sessions = [bytes([number]) for number in range(4)]
    batch_delay = make(dict.fromkeys(sessions, 0.003))
    for turn in range(100, 160):
        size = 1 + turn % 3
        batch_delay.answered(sessions[:size], float(turn), TOKEN_S / len(ALL))
        for number in range(size):
            batch_delay.returned(sessions[number], turn + 0.003 * (1 + number))
    batch_delay.answered(sessions[:1], 200.0, TOKEN_S / len(ALL))
    assert batch_delay.wait_s(set(sessions[1:2]), 200.0) > 0, "two take 6 ms"
    batch_delay.answered(sessions[:2], 200.1, TOKEN_S / len(ALL))
    assert batch_delay.wait_s(set(sessions[2:]), 200.1) == 0, "four take 12 ms, longer than a pass"


@pytest.mark.parametrize("slope_s", [0.0, 0.0001, 0.001])
def test_a_line_shows_what_does_not_depend_on_the_number(slope_s):
    line = LineFit()
    for turn in range(200):
        number = 1 + turn % 12
        line.record(number, 0.002 + slope_s * number)
    assert line.at(0, slope_s / 2) == pytest.approx(0.002, rel=0.05, abs=0.0005)
    assert line.at(20, slope_s / 2) == pytest.approx(0.002 + 20 * slope_s, rel=0.05)


def test_measurements_of_one_number_leave_the_slope_to_what_is_likely():
    line = LineFit()
    assert line.at(0, 0.001) == 0
    for _ in range(10):
        line.record(4, 0.010)
    assert line.at(0, 0.001) == pytest.approx(0.006)
    assert line.at(0, 0.1) == 0
    assert line.at(0, 0.0) == pytest.approx(0.010)
