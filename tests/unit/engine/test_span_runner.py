"""Any interleaving of sessions, chunks, rollbacks and forks gives what plain transformers gives."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import SPAN, Tiny

from planetserve.engine.probe import Batching, agree
from planetserve.engine.span_runner import SpanRunner
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.testing.checkpoints import VOCAB_SIZE
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice

RAGGED = (
    "llama llama_mha llama_mqa_tied llama_odd_heads mistral gemma2 gemma3_text gpt_oss mixtral "
    "qwen2_moe deepseek_v3 llama4_text gpt2 llama_dynamic_rope phi3_longrope"
).split()
PADDED = (
    "bloom codegen diffllama doge falcon_alibi falcon_mqa falcon_new gpt_neo gpt_neox_japanese "
    "gptj mpt nemotron phimoe stablelm xglm"
).split()
# No family needs it; a family that is not listed may.
PLAIN = "bloom falcon_mqa llama llama_dynamic_rope".split()

NUM_PAGES = 64
PAGE_SIZE = 4
MAX_LENGTH = 48


class Harness:
    """Drives a runner through a scheduler with token histories that transformers can rerun."""

    def __init__(self, model: Tiny, runner: SpanRunner, rng: random.Random):
        self.model = model
        self.runner = runner
        self.rng = rng
        self.scheduler = Scheduler(
            SchedulerConfig(
                NUM_PAGES,
                PAGE_SIZE,
                max_batch_tokens=rng.choice([8, 24, 128]),
                max_decode_tokens=2,
                chunkable=runner.chunkable,
            )
        )
        self.rows: dict[bytes, list[list[int]]] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.expected: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.num_items = 0
        self.num_compared = 0

    def open(self, num_rows: int) -> bytes:
        session_id = self.rng.randbytes(8)
        self.scheduler.open(session_id, num_rows)
        self.rows[session_id] = [[] for _ in range(num_rows)]
        return session_id

    def close(self, session_id: bytes) -> None:
        self.scheduler.close(session_id)
        del self.rows[session_id]

    def step(self, session_id: bytes, longest: int, reorder: tuple[int, ...] | None = None) -> None:
        """New tokens for every row, some after a rollback, behind an optional reorder."""
        rng, rows = self.rng, self.rows[session_id]
        if reorder is not None:
            rows = [rows[source][:] for source in reorder]
        slices, inputs, expected = [], [], []
        for number, row in enumerate(rows):
            start = max(0, len(row) - (rng.randint(1, 6) if rng.random() < 0.25 else 0))
            count = min(rng.randint(1, longest), MAX_LENGTH - start)
            if count < 1:
                continue
            row[start:] = rng.choices(range(3, VOCAB_SIZE), k=count)
            entering, leaving = self.model.reference(row)
            slices.append(RowSlice(number, start, count))
            inputs.append(entering[start:])
            expected.append(leaving[start:])
        if slices:
            self.rows[session_id] = rows
            self.scheduler.add(StepRequest(self.num_items, session_id, tuple(slices), reorder))
            self.inputs[self.num_items] = torch.cat(inputs)
            self.expected[self.num_items] = torch.cat(expected)
            self.outputs[self.num_items] = torch.full_like(self.expected[self.num_items], 1e9)
            self.num_items += 1

    @torch.inference_mode()
    def tick(self) -> None:
        batch = self.scheduler.schedule()
        self.runner.prepare(batch)
        if not batch.chunks:
            return
        ranges = [(p.item_id, slice(p.offset, p.offset + p.num_tokens)) for p in batch.chunks]
        output = self.runner.forward(
            batch.chunks,
            torch.cat([self.inputs[item_id][where] for item_id, where in ranges]),
            torch.cat([torch.arange(p.start, p.end) for p in batch.chunks]),
        )
        for (item_id, where), part in zip(
            ranges, output.split([p.num_tokens for p in batch.chunks]), strict=True
        ):
            self.outputs[item_id][where] = part
        for item_id in self.scheduler.commit(batch):
            torch.testing.assert_close(
                self.outputs[item_id], self.expected[item_id], rtol=1e-4, atol=1e-4
            )
            self.num_compared += 1


@pytest.mark.parametrize(
    ("family", "batching"),
    [
        *((family, Batching.RAGGED) for family in RAGGED),
        *((family, Batching.PADDED) for family in (*PADDED, "mistral", "llama_dynamic_rope")),
        *((family, Batching.PLAIN) for family in PLAIN),
    ],
)
def test_random_interleavings_match_transformers(tiny, family, batching):
    model = tiny(family)
    best = Batching.RAGGED if family in PADDED and batching is Batching.PADDED else batching
    runner = SpanRunner(model.load_span(), NUM_PAGES, PAGE_SIZE, best=best)
    assert runner.batching is batching
    rng = random.Random(family)
    harness = Harness(model, runner, rng)
    sessions = [harness.open(num_rows) for num_rows in (1, 1, 2)]
    for session_id in sessions:
        harness.step(session_id, longest=20)
    for _ in range(24):
        action = rng.random()
        session_id = rng.choice(sessions)
        if action < 0.1:
            sessions.remove(session_id)
            num_rows = len(harness.rows[session_id])
            harness.close(session_id)
            sessions.append(harness.open(num_rows))
        elif action < 0.25 and len(harness.rows[session_id]) > 1:
            source = rng.randrange(2)
            harness.step(session_id, longest=1, reorder=rng.choice([(source, source), (1, 0)]))
        else:
            for session_id in rng.sample(sessions, rng.randint(1, len(sessions))):
                harness.step(session_id, longest=rng.choice([1, 1, 3, 18]))
        harness.tick()
    while harness.scheduler.has_work:
        harness.tick()
    assert harness.num_compared > 20
    harness.scheduler.check_integrity()
    for session_id in list(harness.rows):
        harness.close(session_id)
    assert harness.scheduler.num_used_pages == 0


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "falcon_mqa", "mpt"])
def test_beams_that_share_pages_stay_apart(tiny, family):
    model = tiny(family)
    runner = SpanRunner(model.load_span(), NUM_PAGES, PAGE_SIZE)
    harness = Harness(model, runner, random.Random(3))
    beams = harness.open(4)
    harness.step(beams, longest=10)
    for _ in range(12):
        harness.tick()
        harness.step(beams, 1, reorder=tuple(harness.rng.randrange(4) for _ in range(4)))
    while harness.scheduler.has_work:
        harness.tick()
    assert harness.num_compared == 13


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt_neo"])
def test_sessions_over_parts_of_the_span(tiny, family):
    model = tiny(family)
    runner = SpanRunner(model.load_span(), NUM_PAGES, PAGE_SIZE)
    scheduler = Scheduler(SchedulerConfig(NUM_PAGES, PAGE_SIZE))
    tokens = list(range(3, 16))
    states = model.states(tokens)
    parts = [BlockSpan(1, 2), BlockSpan(2, 3), SPAN]
    for part in parts:
        scheduler.open(str(part).encode(), 1)
    with torch.inference_mode():
        for start, end in [(0, 9), (9, 10), (10, 13)]:
            for number, part in enumerate(parts):
                item = StepRequest(number, str(part).encode(), (RowSlice(0, start, end - start),))
                scheduler.add(item)
            batch = scheduler.schedule()
            runner.prepare(batch)
            for chunk in batch.chunks:
                part = parts[chunk.item_id]
                output = runner.forward(
                    [chunk], states[part.start][start:end], torch.arange(start, end), part
                )
                torch.testing.assert_close(
                    output, states[part.end][start:end], rtol=1e-4, atol=1e-4
                )
            scheduler.commit(batch)


@pytest.mark.parametrize("batching", [Batching.RAGGED, Batching.PADDED])
@pytest.mark.parametrize("family", ["llama_dynamic_rope", "phi3_longrope"])
@torch.inference_mode()
def test_nobody_feels_how_long_others_are(tiny, family, batching):
    """Rotary frequencies that follow the length of a pass follow each sequence's own."""
    model = tiny(family)
    runner = SpanRunner(model.load_span(), NUM_PAGES, PAGE_SIZE, best=batching)
    alone = SpanRunner(model.load_span(), NUM_PAGES, PAGE_SIZE, best=Batching.PLAIN)
    assert runner.batching is batching
    assert not runner.can_preempt
    constant = model.load_span().constant_rotary_length
    # The frequencies of the second and the fourth session change after some steps.
    first = [0, constant - 15, constant + 5, constant - 13, 2]
    scheduler = Scheduler(SchedulerConfig(NUM_PAGES, PAGE_SIZE, chunkable=False))
    generator = torch.Generator().manual_seed(3)
    for number in range(len(first)):
        scheduler.open(bytes([number]), 1)
    for start, count in [(0, 10), *((10 + step, 1) for step in range(8)), (18, 2)]:
        for number in range(len(first)):
            row = RowSlice(0, start, count)
            scheduler.add(StepRequest(number, bytes([number]), (row,)))
        batch = scheduler.schedule()
        assert len(batch.chunks) == len(first)
        hidden = torch.randn(batch.num_tokens, 32, generator=generator)
        positions = torch.cat(
            [torch.arange(p.start, p.end) + first[p.item_id] for p in batch.chunks]
        )
        outputs = []
        for one in (runner, alone):
            one.prepare(batch)
            outputs.append(one.forward(batch.chunks, hidden, positions))
        assert agree(*outputs, hidden)
        scheduler.commit(batch)


# Rounding sends a token near a tie to another expert, on one kind of CPU and not on another.
@pytest.mark.parametrize(
    ("family", "largest_error"),
    [
        ("llama", 0.05),
        ("gemma2", 0.05),
        ("deepseek_v3", 0.2),
        ("bloom", 0.05),
        ("falcon_mqa", 0.05),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tiny, family, largest_error, dtype):
    model = tiny(family)
    runner = SpanRunner(model.load_span(dtype), NUM_PAGES, PAGE_SIZE)
    assert runner.is_paged
    harness = Harness(model, runner, random.Random(5))
    entering, leaving = model.reference(list(range(3, 33)))
    session = harness.open(1)
    outputs = []
    with torch.inference_mode():
        for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
            harness.scheduler.add(StepRequest(0, session, (RowSlice(0, start, end - start),)))
            batch = harness.scheduler.schedule()
            runner.prepare(batch)
            for chunk in batch.chunks:
                where = slice(chunk.start, chunk.end)
                outputs.append(
                    runner.forward([chunk], entering[where].to(dtype), torch.arange(30)[where])
                )
            harness.scheduler.commit(batch)
    error = (torch.cat(outputs).float() - leaving).norm() / leaving.norm()
    assert error < largest_error
