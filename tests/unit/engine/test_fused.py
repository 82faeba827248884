"""Fused layers: used where they give what the family's own code gives, and nowhere else."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SPAN

from planetserve.engine.probe import Batching, agree
from planetserve.engine.ragged_runner import RaggedRunner
from planetserve.engine.span_runner import SpanRunner
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.linear import convert_span
from planetserve.model.span_blocks import SpanBlocks
from planetserve.native import library
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.testing.checkpoints import NUM_BLOCKS, make_tiny_checkpoint
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice

pytestmark = pytest.mark.skipif(library.kernels() is None, reason="no kernels were compiled")

WIDE_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "llama": True,
    "llama_bias": True,
    "llama_llama3_rope": True,
    "llama_yarn_rope": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": True,
    # Rotary embeddings of the first half of each head; the other halves are not for the table.
    "glm4_moe": True,
    # Other parts, or the same and other code: multipliers, norms of 1 + w, experts, another order.
    "granite": False,
    "gemma": False,
    "gemma2": False,
    "mixtral": False,
    "olmo2": False,
    "phi": False,
}


def load(family: str, folder: Path, dtype: torch.dtype, backend: str = "native") -> SpanBlocks:
    more: dict[str, Any] = {"residual_multiplier": 0.7} if family == "granite" else {}
    if family == "glm4_moe":
        more = {"first_k_dense_replace": NUM_BLOCKS, "partial_rotary_factor": 0.5}
    make_tiny_checkpoint(folder, family, **WIDE_HEADS, **more)
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), SPAN, dtype)
    convert_span(blocks, backend)
    return blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["native", "plain"])
def test_only_the_common_shape_is_fused(family: str, backend: str, tmp_path: Path) -> None:
    runner = SpanRunner(load(family, tmp_path, torch.float32, backend), 8, 16)
    assert runner.batching is Batching.RAGGED
    assert runner.is_fused == FAMILIES[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name, fits in FAMILIES.items() if fits])
def test_fused_layers_give_what_the_familys_code_gives(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    blocks = load(family, tmp_path, dtype)
    fused = SpanRunner(blocks, 32, 16)
    assert fused.is_fused
    own = RaggedRunner(blocks, 32, 16, fused._runner._backend, 1 << 20)
    scheduler = Scheduler(SchedulerConfig(32, 16))
    generator = torch.Generator().manual_seed(3)
    lengths = [0] * 4
    for index in range(len(lengths)):
        scheduler.open(bytes([index]), num_rows=1)
    with torch.inference_mode():
        for counts in [(40, 3, 17, 1), (1, 1, 1, 1), (1, 5, 2, 9), (1, 1, 1, 1)]:
            for index, count in enumerate(counts):
                rows = (RowSlice(0, lengths[index], count),)
                scheduler.add(StepRequest(index, bytes([index]), rows))
                lengths[index] += count
            batch = scheduler.schedule()
            scheduler.commit(batch)
            hidden = torch.randn(batch.num_tokens, 64, generator=generator).to(dtype)
            positions = torch.cat([torch.arange(p.start, p.end) for p in batch.chunks])
            before = hidden.clone()
            own.prepare(batch)
            fused.prepare(batch)
            for part in (SPAN, BlockSpan(SPAN.start, SPAN.start + 1)):
                actual = fused.forward(batch.chunks, hidden, positions, part)
                assert agree(actual, own.forward(batch.chunks, hidden, positions, part), hidden)
            assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_one_call_for_all_layers_gives_exactly_what_their_kernels_give(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    blocks = load(family, tmp_path, dtype)
    whole = SpanRunner(blocks, 32, 16)._runner
    by_kernel = copy(whole._fused)
    by_kernel._program_over = lambda *_: None
    runners = [whole, RaggedRunner(blocks, 32, 16, whole._backend, 1 << 20, by_kernel)]
    called = []
    kernels = whole._fused._kernels
    run_layers = kernels.layers
    scheduler = Scheduler(SchedulerConfig(32, 16))
    generator = torch.Generator().manual_seed(5)
    for index in range(3):
        scheduler.open(bytes([index]), num_rows=1)
    start = 0
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "layers", lambda *a: (called.append(a[1]), run_layers(*a)))
        for count in (20, 1, 3):
            for index in range(3):
                item = StepRequest(index, bytes([index]), (RowSlice(0, start, count),))
                scheduler.add(item)
            start += count
            batch = scheduler.schedule()
            scheduler.commit(batch)
            hidden = torch.randn(batch.num_tokens, 64, generator=generator).to(dtype)
            positions = torch.cat([torch.arange(p.start, p.end) for p in batch.chunks])
            for part in (SPAN, BlockSpan(SPAN.start + 1, SPAN.end)):
                outputs = []
                for runner in runners:
                    runner.prepare(batch)
                    outputs.append(runner.forward(batch.chunks, hidden, positions, part))
                assert torch.equal(*outputs)
    assert called == [slice(0, len(SPAN)), slice(1, len(SPAN))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_kernels_round_as_pytorch_does(dtype: torch.dtype) -> None:
    kernels = library.kernels()
    torch.manual_seed(2)
    x, weight = (torch.randn(shape).to(dtype) for shape in [(5, 70), (70,)])
    gate, up = ((3 * torch.randn(7, 33)).to(dtype) for _ in range(2))
    heads, cos, sin = (torch.randn(shape).to(dtype) for shape in [(3, 4, 32), (3, 32), (3, 32)])
    turned = torch.cat((-heads[..., 16:], heads[..., :16]), -1)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = [
        weight * normed.to(dtype),
        F.silu(gate) * up,
        heads * cos[:, None] + turned * sin[:, None],
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    for level in range(1, kernels.level + 1):
        kernels.use_level(level)
        try:
            actual = [torch.empty_like(x), gate.clone(), heads.clone()]
            kernels.rms_norm(x, weight, 1e-6, actual[0])
            kernels.silu_gate(actual[1], up)
            kernels.rotate(actual[2], cos, sin)
        finally:
            kernels.use_level(None)
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_heads_are_rotated_alone(dtype: torch.dtype) -> None:
    kernels = library.kernels()
    torch.manual_seed(4)
    heads, cos, sin = (torch.randn(shape).to(dtype) for shape in [(3, 4, 32), (3, 8), (3, 8)])
    part = heads[..., :8].clone()
    turned = torch.cat((-part[..., 4:], part[..., :4]), -1)
    expected = torch.cat((part * cos[:, None] + turned * sin[:, None], heads[..., 8:]), -1)
    kernels.rotate(heads[..., :8], cos, sin)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(heads, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(3, 16),
        torch.zeros(3, 64),
        torch.zeros(2, 32),
        torch.zeros(32),
        torch.zeros(3, 32, dtype=torch.bfloat16),
        torch.zeros(32, 3).t(),
    ],
)
def test_a_rotary_table_that_does_not_fit_is_not_read(table: torch.Tensor) -> None:
    kernels, heads, fit = library.kernels(), torch.ones(3, 4, 32), torch.zeros(3, 32)
    for cos, sin in ((table, fit), (fit, table)):
        with pytest.raises(ValueError, match="rotary table"):
            kernels.rotate(heads, cos, sin)
    assert torch.equal(heads, torch.ones(3, 4, 32))
