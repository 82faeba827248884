"""`planetserve estimate`: sizes are those of blocks that are really loaded, times are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from planetserve.commands import estimate
from planetserve.commands.memory import BlockMemory, free_memory, model_memory
from planetserve.errors import ConfigError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan


def test_sizes_are_those_of_loaded_blocks() -> None:
    checkpoint = Checkpoint.open("demo")
    found = model_memory(checkpoint)
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, 8), torch.float32)
    loaded = [sum(one.nbytes for one in layer.parameters()) for layer in blocks.layers]
    assert list(found.kind("float32").weights) == loaded
    assert list(found.kind("bfloat16").weights) == [size // 2 for size in loaded]
    assert found.kind("float32", "int8").weights[0] < loaded[0] / 3
    shape = blocks.kv_shapes()[0]
    per_token = 4 * shape.num_heads * (shape.key_dim + shape.value_dim)
    assert found.kind("float32").cache == (found.cache_tokens * per_token,) * 8


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "falcon_alibi", "deepseek_v3"])
def test_caches_and_states_of_other_families(family: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family, seed=1)
    checkpoint = Checkpoint.open(tmp_path)
    found = model_memory(checkpoint)
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, checkpoint.num_blocks), torch.bfloat16)
    shapes = blocks.kv_shapes()
    numbers = sum(shape.num_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    assert sum(found.kind("float32").cache) == 4 * found.cache_tokens * numbers
    assert found.state_bytes == blocks.state_bytes()


def test_the_most_consecutive_blocks_that_fit() -> None:
    kind = BlockMemory("float32", "none", (50, 10, 10, 30), (0, 5, 5, 0))
    assert [kind.num_fitting(free) for free in (9, 15, 30, 60, 110)] == [0, 1, 2, 3, 4]


def test_a_container_may_leave_less_than_the_machine(tmp_path: Path) -> None:
    whole = free_memory(torch.device("cpu"), tmp_path)
    assert whole.num_bytes > 2**28
    (tmp_path / "memory.max").write_text("400000000\n")
    (tmp_path / "memory.current").write_text("300000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000000\n")
    limited = free_memory(torch.device("cpu"), tmp_path)
    assert limited.num_bytes < whole.num_bytes
    assert limited.num_bytes >= 150000000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu"), tmp_path).source == whole.source


def test_the_demo_model_is_timed_here(capsys: pytest.CaptureFixture[str]) -> None:
    estimate.main(["demo", "--json", "--torch_dtype", "float32"])
    found = json.loads(capsys.readouterr().out)
    timed = found["timed"]
    alone_ms = 8 * timed["ms_per_block"] + timed["overhead_ms"] + timed["head_ms"]
    assert found["alone_tokens_per_s"] == pytest.approx(1000 / alone_ms)
    rates = [one["tokens_per_s"] for one in found["swarm_of_such_machines"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < found["alone_tokens_per_s"]
    assert "running it here is faster" in found["verdict"]
    assert {(one["dtype"], one["quant_type"]) for one in found["weights"]} >= {
        ("float32", "none"), ("bfloat16", "nf4"),
    }  # fmt: skip


def test_sizes_for_people_without_timing(capsys: pytest.CaptureFixture[str]) -> None:
    estimate.main(["demo", "--no_timing"])
    text = capsys.readouterr().out
    assert "nothing was timed: --no_timing was given" in text
    assert "all 8" in text
    assert "\x1b" not in text


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="say which MODEL"):
        estimate.main([])
    with pytest.raises(ConfigError, match="no-such-model"):
        estimate.main(["./no-such-model"])
    with pytest.raises(ConfigError, match="device"):
        estimate.main(["demo", "--device", "abacus"])
