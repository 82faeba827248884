"""Swarms in virtual time with faults drawn from a seed, and deliberate bugs that must be found."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planetserve.client.ring.ring import RingSession
from planetserve.client.ring.ring_step import RingStep
from planetserve.engine.config import EngineConfig
from planetserve.scheduler.scheduler import Scheduler
from planetserve.testing import virtual_time
from planetserve.testing.fault_plan import FAULTS, SwarmShape
from planetserve.testing.fault_simulation import simulate
from planetserve.testing.integer_model import IntegerRunner, LoopEngine, PlainModel, embed
from planetserve.testing.virtual_time import VirtualClock, VirtualTimeLoop
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 200
MOST_SEEDS = 1000
"""Number of seeds within which a deliberate bug must be found."""


@pytest.mark.timeout(900)
def test_no_seed_shows_a_violation() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "simulate_faults.py"), "--seeds"]
    found = subprocess.run([*command, str(NUM_SEEDS)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{NUM_SEEDS} seeds" in found.stdout
    told = re.findall(r"(\w+) [1-9]", found.stdout.partition("that occurred:")[2])
    assert {*FAULTS} - {*told} == set()


def test_a_seed_gives_the_same_events_every_time() -> None:
    first, again, other = simulate(20), simulate(20), simulate(21)
    assert first == again
    assert first.digest != other.digest


def test_a_ring_that_is_given_up_while_it_opens_is_no_hops_fault() -> None:
    """Clients that had opened some hops when another one refused sent CLOSE instead of EDGE_KEYS,
    and servers counted that as a breach of the protocol."""
    for seed in (0, 4, 5):
        assert simulate(seed).violations == []


def test_a_session_that_was_idle_while_its_servers_restarted_bans_none_of_them() -> None:
    """They had long been back when the session went on, and were banned for a minute."""
    for seed in (98, 212, 55835):
        assert simulate(seed).violations == []


def test_two_hops_that_are_one_server_are_no_pair_to_avoid() -> None:
    """Nothing passed between them; then every plan was refused as a mistake in the settings."""
    weights = (("lie", 2.0), ("cut", 1.0), ("silent", 1.0), ("pause", 1.0))
    assert simulate(805, SwarmShape(servers=(3, 5), weights=weights)).violations == []


def test_honest_servers_sign_for_the_same_whatever_breaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = tuple((name, 1.0) for name in FAULTS if name != "lie")
    for seed in (0, 1, 2, 150):
        outcome = simulate(seed, SwarmShape(servers=(3, 8), weights=weights, receipts=True))
        assert outcome.violations == []
    assert "(receipt)" not in caplog.text
    assert "(edge_mismatch)" not in caplog.text


def test_one_token_at_a_time_gives_what_a_prompt_gives() -> None:
    """Single tokens are computed in a way of their own."""
    whole, single = PlainModel(5), PlainModel(5)
    tokens = [3, 1, 4, 1, 5, 9]
    outputs = whole.extend(tokens)
    assert np.concatenate([single.extend([token]) for token in tokens]).tolist() == outputs.tolist()
    whole.truncate(2)
    assert whole.extend(tokens[2:]).tolist() == outputs[2:].tolist()


def test_a_failed_step_that_nobody_waits_for_is_not_logged() -> None:
    """A hostile hop's step was refused by the engine when its session had ended."""
    complaints: list[object] = []

    async def submit(loop: VirtualTimeLoop) -> None:
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        span = BlockSpan(0, 2)
        runner = IntegerRunner(span, 8, 16, loop, 0.001)
        engine = LoopEngine(runner, EngineConfig(128, 16), VirtualClock(loop))
        engine.start()
        engine.open_session(b"session", "peer", 1, 16, span)
        engine.submit(b"session", StepTable((RowSlice(0, 5, 1),)), embed([1]))
        await asyncio.sleep(1.0)
        gc.collect()
        engine.close()

    virtual_time.run(submit)
    assert complaints == []


def skip_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new first hop is not told what the rows held before."""
    refill = RingSession._refill

    async def skip(ring: RingSession, _history: object) -> None:
        await refill(ring, None)

    monkeypatch.setattr(RingSession, "_refill", skip)


def leak_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is closed while it has steps keeps a page."""
    close = Scheduler.close

    def leak(scheduler: Any, session_id: bytes) -> tuple[int, ...]:
        dropped = close(scheduler, session_id)
        if dropped:
            scheduler._allocator.allocate()
        return dropped

    monkeypatch.setattr(Scheduler, "close", leak)


def drop_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that waits until fewer of its chunks are under way is not woken."""
    take = RingStep.take

    class Deaf:
        def set(self) -> None:
            pass

    def drop(step: RingStep, chunk_TD: Any) -> None:
        room, step.room = step.room, Deaf()  # type: ignore[assignment]
        take(step, chunk_TD)
        step.room = room

    monkeypatch.setattr(RingStep, "take", drop)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("add_bug", [skip_refills, leak_pages, drop_wake_ups])
def test_a_deliberate_bug_is_found(
    add_bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_bug(monkeypatch)
    assert any(simulate(seed).violations for seed in range(MOST_SEEDS))
