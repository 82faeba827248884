"""The engine thread as an event loop sees it: many sessions at once, failures, limits, the end."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
import torch
from tiny_models import SPAN, Tiny

from planetserve.clock import SystemClock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.probe import Batching
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import (
    CacheExhausted,
    ConfigError,
    QueueFull,
    RemoteError,
    RemoteProtocolError,
    SessionClosed,
    SessionError,
    SessionLengthError,
)
from planetserve.tensors import tensor_bytes
from planetserve.testing.checkpoints import VOCAB_SIZE
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

HIDDEN_SIZE = 32


class Poisoned(SpanRunner):
    """Fails on passes that hold a marked token, as a kernel would on bad numbers."""

    MARK = 12345.0

    def forward(self, chunks, hidden_TD, positions_T, span=None):
        if (hidden_TD == self.MARK).any():
            raise RuntimeError("kernel failure")
        return super().forward(chunks, hidden_TD, positions_T, span)


class Slow(SpanRunner):
    """Takes a while for each pass, whatever its tokens, and notes how many sessions shared it."""

    def __init__(self, *args, **kwargs):
        self.sizes: list[int] = []
        super().__init__(*args, **kwargs)

    def forward(self, chunks, hidden_TD, positions_T, span=None):
        self.sizes.append(len({chunk.session_id for chunk in chunks}))
        time.sleep(0.03)
        return super().forward(chunks, hidden_TD, positions_T, span)


def table(start: int, num_tokens: int, **options) -> StepTable:
    return StepTable((RowSlice(0, start, num_tokens),), **options)


def make_engine(tiny, family="llama", runner_class=SpanRunner, **options) -> Engine:
    config = EngineConfig(**{"attn_cache_tokens": 2048, "page_size": 4, **options})
    runner = runner_class(tiny(family).load_span(), config.num_pages, config.page_size)
    engine = Engine(runner, config, SystemClock())
    engine.start()
    return engine


@pytest.fixture
def engine(tiny):
    engine = make_engine(tiny, inference_max_length=256, max_queued_steps=4)
    yield engine
    engine.close()


async def settled(engine: Engine) -> None:
    """Wait until the engine thread has carried out everything posted so far."""
    done = threading.Event()
    engine._worker.post(lambda: None)
    engine._worker.post(done.set)
    await asyncio.to_thread(done.wait)
    # `done` was set before the tick that follows the commands; this one is after it.
    done = threading.Event()
    engine._worker.post(done.set)
    await asyncio.to_thread(done.wait)


async def generate(engine: Engine, model: Tiny, rng: random.Random, num_steps: int) -> int:
    """One session of random prompts, steps and rollbacks, each checked; returns its tokens."""
    session_id = rng.randbytes(16)
    engine.open_session(session_id, "peer", 1, 40)
    tokens: list[int] = []
    total = 0
    for number in range(num_steps):
        start = max(0, len(tokens) - rng.choice([0, 0, 0, 3]))
        count = rng.randint(5, 20) if number == 0 else rng.choice([1, 1, 2])
        count = min(count, 40 - start)
        tokens[start:] = rng.choices(range(3, VOCAB_SIZE), k=count)
        entering, leaving = model.reference(tokens)
        output = await engine.submit(session_id, table(start, count), entering[start:])
        torch.testing.assert_close(output, leaving[start:], rtol=1e-4, atol=1e-4)
        total += count
    engine.close_session(session_id)
    return total


@pytest.mark.parametrize(
    ("family", "num_sessions"), [("llama", 16), ("gemma2", 6), ("stablelm", 6), ("bloom", 6)]
)
async def test_sessions_at_once_match_transformers(tiny, family, num_sessions):
    engine = make_engine(tiny, family, max_batch_tokens=32)
    try:
        await engine.measure()
        async with asyncio.TaskGroup() as group:
            for number in range(num_sessions):
                group.create_task(generate(engine, tiny(family), random.Random(number), 8))
        await settled(engine)
        stats = engine.stats()
    finally:
        engine.close()
    assert (stats.pages_used, stats.pages_leased, stats.num_sessions) == (0, 0, 0)
    assert stats.queued_tokens == 0
    assert stats.free_cache_tokens == 2048
    assert stats.decode_ms_per_block > 0


async def test_sessions_killed_at_random_leave_nothing_behind(tiny):
    engine = make_engine(tiny, max_batch_tokens=16)
    rng = random.Random(11)
    try:
        for _ in range(60):
            session_id = rng.randbytes(16)
            engine.open_session(session_id, "peer", 2, 64)
            rows = StepTable((RowSlice(0, 0, rng.randint(1, 40)), RowSlice(1, 0, 1)))
            future = engine.submit(session_id, rows, torch.randn(rows.num_tokens, HIDDEN_SIZE))
            more = StepTable((RowSlice(1, 1, 1),), reorder=(0, 0))
            with pytest.raises(SessionError):
                await engine.submit(
                    session_id, StepTable((RowSlice(0, 60, 1),)), torch.randn(1, HIDDEN_SIZE)
                )
            engine.submit(session_id, more, torch.randn(1, HIDDEN_SIZE))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            engine.close_session(session_id)
            if not future.done() or future.exception():
                with pytest.raises(SessionClosed):
                    await future
        await settled(engine)
        stats = engine.stats()
    finally:
        engine.close()
    assert (stats.pages_used, stats.pages_leased, stats.queued_tokens) == (0, 0, 0)


async def test_results_are_cpu_tensors_ready_for_the_wire(engine):
    engine.open_session(b"s", "peer", 1, 16)
    output = await engine.submit(b"s", table(0, 3), torch.randn(3, HIDDEN_SIZE))
    assert output.dtype == torch.float32
    assert len(tensor_bytes(output)) == 3 * HIDDEN_SIZE * 4


async def test_given_positions_replace_the_cache_places(engine, tiny):
    tokens = list(range(3, 13))
    entering, leaving = tiny("llama").reference(tokens)
    engine.open_session(b"plain", "peer", 1, 16)
    engine.open_session(b"shifted", "peer", 1, 16)
    # Rotary attention depends on distances alone, so a shift changes nothing and a stretch does.
    shifted = table(0, 10, positions=tuple(range(50, 60)))
    stretched = table(0, 10, positions=tuple(range(0, 100, 10)))
    output = await engine.submit(b"shifted", shifted, entering)
    torch.testing.assert_close(output, leaving, rtol=1e-4, atol=1e-4)
    output = await engine.submit(b"plain", stretched, entering)
    assert (output - leaving).abs().max() > 1e-2


async def test_a_session_may_use_part_of_the_span(engine, tiny):
    states = tiny("llama").states(list(range(3, 12)))
    engine.open_session(b"whole", "peer", 1, 16)
    engine.open_session(b"part", "peer", 1, 16, BlockSpan(2, 3))
    whole = engine.submit(b"whole", table(0, 9), states[SPAN.start])
    part = engine.submit(b"part", table(0, 9), states[2])
    for output in (await whole, await part):
        torch.testing.assert_close(output, states[SPAN.end], rtol=1e-4, atol=1e-4)
    with pytest.raises(RemoteProtocolError, match="not all served here"):
        engine.open_session(b"outside", "peer", 1, 16, BlockSpan(2, 4))


async def test_pipelined_chunks_need_no_waiting(engine, tiny):
    tokens = list(range(3, 27))
    entering, leaving = tiny("llama").reference(tokens)
    engine.open_session(b"s", "peer", 1, 24)
    futures = [
        engine.submit(b"s", table(start, 8), entering[start : start + 8]) for start in (0, 8, 16)
    ]
    output = torch.cat(await asyncio.gather(*futures))
    torch.testing.assert_close(output, leaving, rtol=1e-4, atol=1e-4)


async def test_admission_is_refused_at_once_when_pages_are_leased(engine):
    for number in range(8):
        engine.open_session(bytes([number]), "peer", 1, 256)
    with pytest.raises(CacheExhausted) as refusal:
        engine.open_session(b"late", "peer", 1, 1)
    assert refusal.value.retry_after_s > 0
    engine.close_session(bytes([0]))
    engine.open_session(b"late", "peer", 1, 256)


async def test_steps_past_the_limits_are_refused(engine):
    engine.open_session(b"s", "peer", 1, 8)
    with pytest.raises(SessionLengthError):
        engine.open_session(b"long", "peer", 1, 257)
    with pytest.raises(SessionLengthError):
        engine.submit(b"s", table(250, 7), torch.zeros(7, HIDDEN_SIZE))
    with pytest.raises(RemoteProtocolError, match="needs a tensor"):
        engine.submit(b"s", table(0, 7), torch.zeros(6, HIDDEN_SIZE))
    with pytest.raises(SessionError, match="no session"):
        engine.submit(b"other", table(0, 1), torch.zeros(1, HIDDEN_SIZE))
    with pytest.raises(SessionError, match="open already"):
        engine.open_session(b"s", "peer", 1, 8)
    assert engine.stats().pages_leased == 2


async def test_a_session_grows_past_its_lease_while_there_is_room(engine):
    engine.open_session(b"s", "peer", 1, 4)
    await engine.submit(b"s", table(0, 20), torch.randn(20, HIDDEN_SIZE))
    assert engine.stats().pages_leased == 5
    for number in range(7):
        engine.open_session(bytes([number]), "peer", 1, 256)
    engine.open_session(b"rest", "peer", 1, engine.stats().free_cache_tokens)
    with pytest.raises(CacheExhausted):
        engine.submit(b"s", table(20, 1), torch.randn(1, HIDDEN_SIZE))


async def test_the_useful_share_of_kv_memory_is_reported(engine):
    assert engine.stats().kv_useful_share == 1
    engine.open_session(b"s", "peer", 4, 16)
    await engine.submit(b"s", table(0, 6), torch.randn(6, HIDDEN_SIZE))
    await settled(engine)
    stats = engine.stats()
    assert (stats.pages_used, stats.live_tokens, stats.kv_useful_share) == (2, 6, 6 / 8)
    every = StepTable(tuple(RowSlice(row, 6, 1) for row in range(4)), reorder=(0, 0, 0, 0))
    await engine.submit(b"s", every, torch.randn(4, HIDDEN_SIZE))
    await settled(engine)
    stats = engine.stats()
    # The full page is shared, the other one has become four.
    assert (stats.pages_used, stats.live_tokens, stats.kv_useful_share) == (5, 16, 16 / 20)


async def test_the_queue_of_a_session_is_bounded(engine):
    engine.open_session(b"s", "peer", 1, 64)
    hold = threading.Event()
    engine._worker.post(hold.wait)
    try:
        futures = [engine.submit(b"s", table(0, 8), torch.randn(8, HIDDEN_SIZE)) for _ in range(4)]
        with pytest.raises(QueueFull):
            engine.submit(b"s", table(0, 1), torch.randn(1, HIDDEN_SIZE))
        engine.open_session(b"t", "peer", 1, 8)
        # All that a session had, and a step that takes the end of it back.
        futures.append(engine.submit(b"t", table(0, 8), torch.randn(8, HIDDEN_SIZE)))
        futures.append(engine.submit(b"t", table(5, 3), torch.randn(3, HIDDEN_SIZE)))
        with pytest.raises(QueueFull):
            engine.submit(b"t", table(0, 6), torch.randn(6, HIDDEN_SIZE))
    finally:
        hold.set()
    await asyncio.gather(*futures)
    await engine.submit(b"s", table(0, 1), torch.randn(1, HIDDEN_SIZE))


async def test_a_failing_pass_fails_only_its_own_session(tiny):
    engine = make_engine(tiny, runner_class=Poisoned)
    tokens = list(range(3, 11))
    entering, leaving = tiny("llama").reference(tokens)
    hold = threading.Event()
    try:
        for session_id in (b"good", b"bad", b"fine"):
            engine.open_session(session_id, "peer", 1, 16)
        engine._worker.post(hold.wait)
        good = engine.submit(b"good", table(0, 8), entering)
        bad = engine.submit(b"bad", table(0, 2), torch.full((2, HIDDEN_SIZE), Poisoned.MARK))
        bad_next = engine.submit(b"bad", table(2, 1), torch.zeros(1, HIDDEN_SIZE))
        fine = engine.submit(b"fine", table(0, 8), entering)
        hold.set()
        for future in (good, fine):
            torch.testing.assert_close(await future, leaving, rtol=1e-4, atol=1e-4)
        for future in (bad, bad_next):
            with pytest.raises(RemoteError):
                await future
        with pytest.raises(SessionError):
            await engine.submit(b"bad", table(0, 1), torch.zeros(1, HIDDEN_SIZE))
        engine.close_session(b"bad")
        engine.open_session(b"bad", "peer", 1, 16)
        await engine.submit(b"bad", table(0, 8), entering)
    finally:
        hold.set()
        engine.close()


async def test_numbers_that_are_not_finite_reach_nobody_else(tiny):
    for check_finite in (False, True):
        engine = make_engine(tiny, check_finite=check_finite, attn_cache_tokens=64)
        tokens = list(range(3, 11))
        entering, leaving = tiny("llama").reference(tokens)
        try:
            # Fill every page with NaN, or try to.
            for _ in range(2):
                engine.open_session(b"bad", "peer", 4, 16)
                rows = StepTable(tuple(RowSlice(row, 0, 16) for row in range(4)))
                step = engine.submit(b"bad", rows, torch.full((64, HIDDEN_SIZE), torch.nan))
                if check_finite:
                    with pytest.raises(RemoteProtocolError):
                        await step
                else:
                    assert (await step).isnan().all()
                engine.close_session(b"bad")
            # The pages are used again, by short contexts that share an attention call.
            for number in range(4):
                engine.open_session(bytes([number]), "peer", 1, 16)
            for start, end in [(0, 5), (5, 6), (6, 8)]:
                outputs = await asyncio.gather(
                    *(
                        engine.submit(
                            bytes([number]), table(start, end - start), entering[start:end]
                        )
                        for number in range(4)
                    )
                )
                for output in outputs:
                    torch.testing.assert_close(output, leaving[start:end], rtol=1e-4, atol=1e-4)
        finally:
            engine.close()


async def test_measuring_leaves_an_empty_cache_and_plausible_speeds(engine):
    await engine.measure()
    await settled(engine)
    stats = engine.stats()
    assert stats.decode_ms_per_block > 0
    assert stats.overhead_ms >= 0
    assert stats.tokens_per_s_per_block > 0
    assert stats.pages_used == 0
    engine.open_session(b"s", "peer", 1, 8)
    with pytest.raises(SessionError):
        await engine.measure()


async def test_closing_fails_what_is_pending_and_stops_the_thread(tiny):
    before = set(threading.enumerate())
    engine = make_engine(tiny)
    (thread,) = [
        item
        for item in threading.enumerate()
        if item.name == "planetserve-engine" and item not in before
    ]
    engine.open_session(b"s", "peer", 1, 64)
    futures = [engine.submit(b"s", table(0, 40), torch.randn(40, HIDDEN_SIZE)) for _ in range(1)]
    engine.close()
    for future in futures:
        with pytest.raises(SessionClosed):
            await future
    assert not thread.is_alive()
    with pytest.raises(SessionClosed):
        engine.open_session(b"t", "peer", 1, 8)
    engine.close()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="attn_cache_tokens"):
        EngineConfig(attn_cache_tokens=8)
    with pytest.raises(ConfigError, match="at least 1"):
        EngineConfig(attn_cache_tokens=64, num_threads=0)


def make_overcommitted(tiny, **options) -> Engine:
    limits = {"attn_cache_tokens": 64, "max_batch_tokens": 16, "kv_overcommit": 8.0}
    return make_engine(tiny, **{**limits, **options})


@pytest.mark.parametrize(
    ("family", "max_peer_share"), [("llama", 0.25), ("llama", 1.0), ("falcon_mqa", 1.0)]
)
async def test_sessions_that_lose_pages_match_transformers(tiny, family, max_peer_share):
    engine = make_overcommitted(tiny, family=family, max_peer_share=max_peer_share)
    try:
        all_open = threading.Event()  # afterwards pages are short, and nobody gets in
        engine._worker.post(all_open.wait)
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(generate(engine, tiny(family), random.Random(number), 12))
            await asyncio.sleep(0)
            all_open.set()
        await settled(engine)
        stats = engine.stats()
    finally:
        engine.close()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    held = (stats.pages_used, stats.pages_leased, stats.kept_input_bytes, stats.sessions_waiting)
    assert held == (0, 0, 0, 0)


async def fill(engine: Engine, session_id: bytes, length: int) -> None:
    for start in range(0, length, 16):
        await engine.submit(session_id, table(start, 16), torch.randn(16, HIDDEN_SIZE))


async def test_a_session_that_waits_too_long_for_pages_ends_with_a_retryable_error(tiny):
    engine = make_overcommitted(tiny, max_page_wait_s=0.2)
    try:
        for session_id in (b"old", b"new"):
            engine.open_session(session_id, "peer", 1, 64)
        await fill(engine, b"old", 48)
        await fill(engine, b"new", 16)
        await settled(engine)
        used = engine.stats().kept_input_bytes
        assert used == 64 * HIDDEN_SIZE * 4
        stuck = engine.submit(b"new", table(16, 16), torch.randn(16, HIDDEN_SIZE))
        await settled(engine)
        assert engine.stats().sessions_waiting == 1
        # While somebody waits, nothing is promised beyond what there is.
        with pytest.raises(CacheExhausted):
            engine.open_session(b"late", "peer", 1, 4)
        with pytest.raises(CacheExhausted) as refusal:
            await stuck
        assert refusal.value.retryable
        engine.close_session(b"new")
        await settled(engine)
        assert engine.stats().sessions_waiting == 0
        engine.open_session(b"late", "peer", 1, 4)
        await engine.submit(b"old", table(48, 16), torch.randn(16, HIDDEN_SIZE))
    finally:
        engine.close()


async def test_quiet_sessions_give_up_their_pages_to_newer_ones(tiny):
    """Two servers may have admitted two sessions in different orders; neither waits for long."""
    model = tiny("llama")
    engine = make_overcommitted(tiny)
    try:
        for session_id in (b"old", b"new"):
            engine.open_session(session_id, "peer", 1, 64)
        entering, leaving = model.reference(list(range(5, 54)))
        await engine.submit(b"old", table(0, 48), entering[:48])
        await fill(engine, b"new", 16)
        await engine.submit(b"new", table(16, 16), torch.randn(16, HIDDEN_SIZE))
        assert engine.stats().preemptions == 1
        engine.close_session(b"new")
        output = await engine.submit(b"old", table(48, 1), entering[48:])
        torch.testing.assert_close(output, leaving[48:], rtol=1e-4, atol=1e-4)
    finally:
        engine.close()


async def test_plain_caches_are_not_promised_twice(tiny):
    config = EngineConfig(64, page_size=4, kv_overcommit=4.0)
    runner = SpanRunner(tiny("llama").load_span(), config.num_pages, 4, best=Batching.PLAIN)
    engine = Engine(runner, config, SystemClock())
    assert engine.stats().free_cache_tokens == 64
    engine.open_session(b"a", "peer", 1, 64)
    with pytest.raises(CacheExhausted):
        engine.open_session(b"b", "peer", 1, 1)
    engine.close()


async def test_sessions_that_come_back_soon_share_passes(tiny):
    """They start half a pass apart; unless one is waited for, that is how they go on."""
    engine = make_engine(tiny, runner_class=Slow)
    engine.runner.sizes.clear()  # of the probe

    async def write(key: bytes, delay_s: float) -> None:
        engine.open_session(key, "peer", 1, 64)
        await asyncio.sleep(delay_s)
        for start in range(24):
            await engine.submit(key, table(start, 1), torch.randn(1, HIDDEN_SIZE))

    try:
        async with asyncio.timeout(60):
            await asyncio.gather(write(b"a", 0.0), write(b"b", 0.015))
    finally:
        engine.close()
    assert engine.runner.sizes.count(2) > engine.runner.sizes.count(1)
