"""Recurrent layers in the engine: shared passes, rollbacks, forks, preemption, nothing left."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from planetserve.clock import SystemClock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import CacheExhausted, ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import HYBRID_FAMILIES, make_tiny_checkpoint
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

WIDTH = 32
SPAN = BlockSpan(0, 3)
FEW = ("jamba", "lfm2", "nemotron_h", "qwen3_next")
"""One of each kind of state."""


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory):
    """`span(family)`: three blocks of a tiny model, for an engine and to compare with."""
    made = {}

    def load(family: str) -> tuple[SpanBlocks, SpanBlocks]:
        if family not in made:
            # Its own code bounds time steps in passes of many tokens and not in those of one.
            options = {"time_step_min": 1e-9} if family == "nemotron_h" else {}
            folder = make_tiny_checkpoint(tmp_path_factory.mktemp(family), family, **options)
            checkpoint = Checkpoint.open(str(folder))
            made[family] = tuple(SpanBlocks.load(checkpoint, SPAN, torch.float32) for _ in range(2))
        return made[family]

    return load


class Rows:
    """A session of an engine and what each of its rows holds; every output is checked."""

    def __init__(self, engine: Engine, blocks: SpanBlocks, num_rows: int, seed: int):
        self.engine, self.blocks = engine, blocks
        self.key = bytes([seed]) * 16
        self.generator = torch.Generator().manual_seed(seed)
        self.held = [torch.zeros(0, WIDTH) for _ in range(num_rows)]
        engine.open_session(self.key, f"peer {seed}", num_rows, 64)

    async def step(self, *slices: tuple[int, int, int], reorder=None) -> None:
        """`slices`: `(row, start, tokens)`."""
        if reorder is not None:
            self.held = [self.held[row] for row in reorder]
        new = torch.randn(sum(n for *_, n in slices), WIDTH, generator=self.generator)
        parts = new.split([n for *_, n in slices])
        table = StepTable(tuple(RowSlice(*part) for part in slices), reorder=reorder)
        output = await self.engine.submit(self.key, table, new)
        for (row, start, num), part, own in zip(
            slices, parts, output.split([n for *_, n in slices]), strict=True
        ):
            self.held[row] = torch.cat([self.held[row][:start], part])
            with torch.inference_mode():
                positions = torch.arange(start + num)[None]
                whole = self.blocks.run(self.held[row][None], positions)[0, start:]
            torch.testing.assert_close(own, whole, atol=1e-3, rtol=1e-3)

    def length(self, row: int = 0) -> int:
        return len(self.held[row])


def run(blocks: SpanBlocks, work, **options) -> Engine:
    """Run `work(engine)`; afterwards nothing may be held."""
    config = EngineConfig(**{"attn_cache_tokens": 2048, "page_size": 4, **options})
    runner = SpanRunner(
        blocks, config.num_pages, config.page_size, state_snapshots=config.state_snapshots
    )
    engine = Engine(runner, config, SystemClock())
    engine.start()

    async def all_of_it() -> None:
        await work(engine)
        for key in list(engine._pending):
            engine.close_session(key)
        done = asyncio.get_running_loop().create_future()
        done_soon = done.get_loop().call_soon_threadsafe
        # The batch after this command forgets what the sessions held.
        engine._worker.post(lambda: None)
        engine._worker.post(lambda: done_soon(done.set_result, None))
        await done

    try:
        asyncio.run(all_of_it())
    finally:
        engine.close()
    engine._worker._scheduler.check_integrity()
    engine._worker._runner.prepare(engine._worker._scheduler.schedule())
    assert engine._worker._scheduler.num_used_pages == 0
    assert runner.state_bytes_held == 0
    return engine


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_prompts_chunks_steps_and_rollbacks(family: str, span) -> None:
    blocks, known = span(family)

    async def work(engine: Engine) -> None:
        rows = Rows(engine, known, 1, seed=1)
        await rows.step((0, 0, 21))
        for start, num in [(21, 1), (22, 3), (23, 1), (24, 1), (10, 4), (13, 1), (0, 2), (2, 1)]:
            await rows.step((0, start, num))

    run(blocks, work, max_batch_tokens=8)


@pytest.mark.parametrize("snapshots", [1, 3])
@pytest.mark.parametrize("family", FEW)
def test_sessions_of_any_kind_at_once(family: str, snapshots: int, span) -> None:
    blocks, known = span(family)

    async def one(engine: Engine, seed: int) -> None:
        rng = random.Random(seed)
        rows = Rows(engine, known, 2, seed)
        await rows.step((0, 0, rng.randint(1, 20)), (1, 0, rng.randint(1, 20)))
        for _ in range(8):
            back = [rng.choice([0, 0, 0, 1, 4, 30]) for _ in range(2)]
            starts = [max(0, rows.length(row) - back[row]) for row in range(2)]
            slices = [(row, starts[row], rng.choice([1, 1, 1, 3])) for row in range(2)]
            await rows.step(*slices[: rng.randint(1, 2)])
            if rng.random() < 0.4:
                await rows.step(*((row, rows.length(0), 1) for row in range(2)), reorder=(0, 0))

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(one(engine, seed) for seed in range(1, 5)))

    run(blocks, work, state_snapshots=snapshots, max_batch_tokens=16)


@pytest.mark.parametrize("family", FEW)
def test_sessions_that_lose_their_pages_get_their_states_back(family: str, span) -> None:
    blocks, known = span(family)
    states = SpanRunner(blocks, 512, 4).states.pages

    async def one(engine: Engine, seed: int) -> None:
        rows = Rows(engine, known, 2, seed)
        await rows.step((0, 0, 9), (1, 0, 5))
        for _ in range(12):
            await rows.step(*((row, rows.length(row), 1) for row in range(2)))
            await rows.step(*((row, rows.length(row) - 1, 2) for row in range(2)))

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(one(engine, seed) for seed in range(1, 5)))

    pages = 2 * (states + 16) + 2
    engine = run(blocks, work, attn_cache_tokens=4 * pages, kv_overcommit=4.0)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("family", FEW)
def test_a_preempted_session_holds_no_states(family: str, span) -> None:
    blocks, known = span(family)
    states = SpanRunner(blocks, 512, 4).states.pages
    pages = 2 * states + 20  # of keys and values 20 beside the states of two

    async def work(engine: Engine) -> None:
        old = Rows(engine, known, 1, seed=1)
        for position in range(8):
            await old.step((0, position, 1))
        of_one = engine.runner.state_bytes_held
        new = Rows(engine, known, 1, seed=2)
        await new.step((0, 0, 48))
        assert engine.runner.state_bytes_held > of_one
        await old.step((0, 8, 1))
        assert engine.stats().preemptions == 0
        while not engine.stats().preemptions:
            await old.step((0, old.length(), 4))
        assert engine.runner.state_bytes_held == of_one
        # What it has lost is computed again, from the beginning.
        engine.close_session(old.key)
        await new.step((0, 48, 1))
        assert engine.stats().recomputed_tokens == 48

    run(blocks, work, attn_cache_tokens=4 * pages, kv_overcommit=4.0)


def test_states_count_in_leases_and_announcements(span) -> None:
    blocks, known = span("qwen3_next")

    async def work(engine: Engine) -> None:
        per_row = engine.runner.states.pages
        assert per_row > 0
        total = engine.runner.num_pages
        assert engine.stats().free_cache_tokens == 4 * (total - per_row)
        rows = Rows(engine, known, 2, seed=1)
        assert engine.stats().pages_leased == 2 * (per_row + 16)
        assert engine.leased_tokens(rows.key) == 2 * 64
        await rows.step((0, 0, 4), (1, 0, 4))
        assert engine._worker._scheduler.num_used_pages == 2 * (per_row + 1)
        # No more memory than is counted, whatever the layers make their states from.
        assert 0 < engine.runner.state_bytes_held <= 2 * 3 * blocks.state_bytes()
        with pytest.raises(CacheExhausted):
            engine.open_session(b"large", "peer", 2, 4 * (total - per_row) // 2)

    run(blocks, work, inference_max_length=2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "by_token"), [("jamba", True), ("qwen3_next", False)])
def test_layers_that_begin_anew_are_given_single_tokens(
    family: str, by_token: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    for part in (BlockSpan(0, 3), BlockSpan(2, 4)):
        runner = SpanRunner(SpanBlocks.load(checkpoint, part, dtype), 64, 16)
        assert runner.verdict.by_token == by_token


def test_a_cache_that_holds_no_state_and_a_budget_of_none_are_refused(span) -> None:
    with pytest.raises(ConfigError, match="holds no session.*--attn_cache_tokens") as error:
        SpanRunner(span("qwen3_next")[0], 2, 4)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="state_snapshots=0"):
        EngineConfig(attn_cache_tokens=64, state_snapshots=0)
