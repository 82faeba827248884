"""Sessions that use different parts of a span share passes where these overlap."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from planetserve.clock import SystemClock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.probe import Batching
from planetserve.engine.span_runner import SpanRunner
from planetserve.errors import RemoteError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.linear import convert_span
from planetserve.model.span_blocks import SpanBlocks
from planetserve.native import library
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

HIDDEN_SIZE = 64
WIDE_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ALL = BlockSpan(0, 4)
MARK = 12345.0


class Recorder(SpanRunner):
    """Notes which blocks each pass ran for how many chunks; fails on marked tokens from block 2."""

    def __init__(self, *args, **kwargs):
        self.passes: list[tuple[str, int]] = []
        super().__init__(*args, **kwargs)

    def forward(self, chunks, hidden_TD, positions_T, span=None):
        self.passes.append((str(span), len(chunks)))
        if span.start >= 2 and (hidden_TD == MARK).any():
            raise RuntimeError("kernel failure")
        return super().forward(chunks, hidden_TD, positions_T, span)


@pytest.fixture(
    params=[
        ("llama", Batching.RAGGED),
        ("stablelm", Batching.PADDED),
        ("llama", Batching.PLAIN),
    ],
    ids=lambda param: param[1],
)
def engine(request, tmp_path: Path):
    """Two that share passes, and one that does not."""
    family, batching = request.param
    make_tiny_checkpoint(tmp_path, family, **WIDE_HEADS)
    blocks = SpanBlocks.load(Checkpoint.open(str(tmp_path)), ALL, torch.float32)
    if library.kernels() is not None:
        convert_span(blocks, "native")
    runner = Recorder(blocks, 64, 4, best=batching)
    assert runner.batching is batching
    engine = Engine(runner, EngineConfig(attn_cache_tokens=256, page_size=4), SystemClock())
    engine.start()
    yield engine
    engine.close()


def step(start: int, num_tokens: int, num_rows: int = 1) -> StepTable:
    return StepTable(tuple(RowSlice(row, start, num_tokens) for row in range(num_rows)))


async def together(engine: Engine, steps: dict[bytes, tuple[StepTable, torch.Tensor]]) -> list:
    """Outputs or errors of one step per session, all of them in one batch."""
    hold = threading.Event()
    engine._worker.post(hold.wait)
    futures = [engine.submit(key, *own) for key, own in steps.items()]
    engine.runner.passes.clear()
    hold.set()
    return await asyncio.gather(*futures, return_exceptions=True)


@pytest.mark.parametrize(
    ("parts", "shared"),
    [
        (["0:3", "1:4"], [("0:1", 1), ("1:3", 2), ("3:4", 1)]),
        (["0:4", "1:2", "0:4"], [("0:1", 2), ("1:2", 3), ("2:4", 2)]),
        (["3:4", "0:2"], [("0:2", 1), ("3:4", 1)]),
        (["1:3", "1:3"], [("1:3", 2)]),
    ],
    ids=["overlapping", "nested", "disjoint", "same"],
)
async def test_sharing_passes_changes_no_result(engine, parts, shared):
    generator = torch.Generator().manual_seed(1)
    keys = [bytes([index]) for index in range(len(parts))]
    alone = [b"alone" + key for key in keys]
    for index, part in enumerate(parts):
        for key in (keys[index], alone[index]):
            engine.open_session(key, "peer", 1 + index % 2, 16, BlockSpan.parse(part))
    # Few enough at a time for our own kernels, whose sums do not depend on the company.
    for start, count in [(0, 4), (4, 4), (8, 2), (10, 2), (12, 1)]:
        tables = [step(start, count, 1 + index % 2) for index in range(len(parts))]
        inputs = [
            torch.randn(table.num_tokens, HIDDEN_SIZE, generator=generator) for table in tables
        ]
        kept = [hidden_TD.clone() for hidden_TD in inputs]
        steps = list(zip(tables, inputs, strict=True))
        outputs = await together(engine, dict(zip(keys, steps, strict=True)))
        rows_each = [1 + index % 2 for index in range(len(parts))]
        if engine.runner.is_paged:
            sessions = {span: count for span, count in shared}
            assert [span for span, _ in engine.runner.passes] == list(sessions)
            for span, num_chunks in engine.runner.passes:
                covering = [n for part, n in zip(parts, rows_each, strict=True)
                            if BlockSpan.parse(part).covers(BlockSpan.parse(span))]  # fmt: skip
                assert (num_chunks, sessions[span]) == (sum(covering), len(covering))
        else:
            assert sorted(span for span, _ in engine.runner.passes) == sorted(set(parts))
        for key, own, output in zip(alone, steps, outputs, strict=True):
            expected = await engine.submit(key, *own)
            is_exact = engine.runner.batching is not Batching.PADDED  # padding changes sums' order
            if is_exact and library.kernels() is not None:
                assert torch.equal(output, expected)
            else:
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, inputs, kept))


async def test_a_pass_that_fails_half_way_fails_only_its_own_session(engine):
    generator = torch.Generator().manual_seed(2)
    parts = {b"early": "0:2", b"bad": "2:4", b"whole": "0:4", b"late": "1:4"}
    for key, part in parts.items():
        engine.open_session(key, "peer", 1, 16, BlockSpan.parse(part))
        engine.open_session(b"alone " + key, "peer", 1, 16, BlockSpan.parse(part))
    inputs = {key: torch.randn(5, HIDDEN_SIZE, generator=generator) for key in parts}
    wanted = {
        key: await engine.submit(b"alone " + key, step(0, 5), hidden_TD)
        for key, hidden_TD in inputs.items()
    }
    inputs[b"bad"][3] = MARK
    outputs = await together(engine, {key: (step(0, 5), inputs[key]) for key in parts})
    for key, output in zip(parts, outputs, strict=True):
        if key == b"bad":
            assert isinstance(output, RemoteError)
        else:
            # Written twice: by the pass that failed, and by the one that ran it alone.
            torch.testing.assert_close(output, wanted[key], rtol=1e-4, atol=1e-4)
    following = torch.randn(1, HIDDEN_SIZE, generator=generator)
    outputs = await together(
        engine, {key: (step(5, 1), following) for key in parts if key != b"bad"}
    )
    for key, output in zip((b"early", b"whole", b"late"), outputs, strict=True):
        expected = await engine.submit(b"alone " + key, step(5, 1), following)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
