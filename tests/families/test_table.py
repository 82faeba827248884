"""docs/families.md names every family that is tested, with the verdict the code gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planetserve.engine.span_runner import SpanRunner
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import (
    FAMILIES,
    REFUSED_FAMILIES,
    SERVABLE_FAMILIES,
    make_tiny_checkpoint,
)
from planetserve.types import BlockSpan

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def rows() -> list[list[str]]:
    """The table's cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_family() -> None:
    assert {row[0]: row[1] for row in rows()} == {n: f.model_type for n, f in FAMILIES.items()}
    assert {row[0] for row in rows() if row[2] == "refused"} == set(REFUSED_FAMILIES)


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
def test_the_page_says_how_sessions_share_passes(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, checkpoint.num_blocks), torch.float32)
    runner = SpanRunner(blocks, num_pages=64, page_size=16)
    assert runner.batching == {row[0]: row[2] for row in rows()}[family]
