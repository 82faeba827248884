"""Batches of many sessions on a device give what transformers gives for each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from planetserve.engine.probe import Batching
from planetserve.engine.span_runner import SpanRunner
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.scheduler.batch import StepRequest
from planetserve.scheduler.scheduler import Scheduler, SchedulerConfig
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice

SPAN = BlockSpan(1, 3)
NUM_PAGES = 64
PAGE_SIZE = 4
LENGTHS = (23, 1, 9, 14, 30)
NUM_DECODES = 3

FAMILIES = {
    "llama": {},  # grouped-query heads
    "llama_mqa_tied": {},
    "gpt2": {},  # a head of its own for every query
    "mistral": {},  # sliding windows
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": {},
    "gpt_oss": {},  # sinks
    "bloom": {},  # padded rows
    "falcon_mqa": {},
}
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.inference_mode()
def reference(folder: Path, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What enters and what leaves the span, `[T, D]` for each session, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(5)
    entering, leaving = [], []
    for length in LENGTHS:
        tokens = torch.randint(3, 96, (1, length + NUM_DECODES), generator=generator)
        states = model(tokens.to(device), output_hidden_states=True).hidden_states
        entering.append(states[SPAN.start][0])
        leaving.append(states[SPAN.end][0])
    return entering, leaving


@torch.inference_mode()
def run(runner: SpanRunner, entering: list[torch.Tensor]) -> list[torch.Tensor]:
    """The span's outputs: all prompts in one batch, a rollback of two tokens, then decode steps."""
    scheduler = Scheduler(SchedulerConfig(runner.num_pages, runner.page_size))
    outputs = [torch.zeros_like(rows) for rows in entering]
    for number in range(len(LENGTHS)):
        scheduler.open(bytes([number]), 1)
    steps = [[(0, length) for length in LENGTHS]]
    steps.append([(max(0, length - 2), length) for length in LENGTHS])
    for step in range(NUM_DECODES):
        steps.append([(length + step, length + step + 1) for length in LENGTHS])
    for ranges in steps:
        for number, (start, end) in enumerate(ranges):
            row = RowSlice(0, start, end - start)
            scheduler.add(StepRequest(number, bytes([number]), (row,)))
        batch = scheduler.schedule()
        assert len(batch.pieces) == len(LENGTHS)
        runner.prepare(batch)
        pieces = [(piece.item_id, slice(piece.start, piece.end)) for piece in batch.pieces]
        hidden = torch.cat([entering[number][where] for number, where in pieces])
        positions = torch.cat([torch.arange(where.start, where.stop) for _, where in pieces])
        output = runner.forward(batch.pieces, hidden.to(runner.dtype), positions.to(runner.device))
        scheduler.commit(batch)
        assert output.device.type == runner.device.type
        parts = output.float().split([where.stop - where.start for _, where in pieces])
        for (number, where), part in zip(pieces, parts, strict=True):
            outputs[number][where] = part
    return outputs


@pytest.mark.parametrize("dtype", list(LARGEST_ERROR), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_what_transformers_gives(
    family: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, family, **FAMILIES[family])
    entering, leaving = reference(folder, device)
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), SPAN, dtype, device)
    runner = SpanRunner(blocks, NUM_PAGES, PAGE_SIZE)
    assert runner.device.type == device.type
    padded = family in ("bloom", "falcon_mqa")
    assert runner.batching is (Batching.PADDED if padded else Batching.RAGGED)
    added = torch.cat(leaving) - torch.cat(entering)
    error = torch.cat(run(runner, entering)) - torch.cat(leaving)
    assert error.norm() < LARGEST_ERROR[dtype] * added.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_large_pages_read_in_place_give_what_transformers_gives(
    family: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    if device.type != "cuda":
        pytest.skip("the kernel is for CUDA")
    folder = make_tiny_checkpoint(tmp_path, family)
    entering, leaving = reference(folder, device)
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), SPAN, dtype, device)
    runner = SpanRunner(blocks, num_pages=1024, page_size=16)
    if runner.page_size == 16:
        pytest.skip("this torch or this device does not have the kernel")
    assert runner.batching is Batching.RAGGED
    assert (runner.num_pages, runner.page_size) == (64, 256)
    added = torch.cat(leaving) - torch.cat(entering)
    for _ in range(2):  # the second time on pages that have been used
        error = torch.cat(run(runner, entering)) - torch.cat(leaving)
        assert error.norm() < LARGEST_ERROR[dtype] * added.norm()
