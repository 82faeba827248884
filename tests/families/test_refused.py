"""Families that cannot be served are refused with their reason, before any weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.client_half import load_client_half
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import FAMILIES, REFUSED_FAMILIES, make_tiny_checkpoint
from planetserve.types import BlockSpan


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_both_ends_refuse_with_the_reason(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    with pytest.raises(ModelError) as server:
        SpanBlocks.load(checkpoint, BlockSpan(0, 1), torch.float32)
    with pytest.raises(ModelError) as client:
        load_client_half(checkpoint, torch.float32, "cpu", remote=lambda hidden: hidden)
    assert FAMILIES[family].refusal in str(server.value)
    assert str(server.value) == str(client.value)
    assert "\n" not in str(server.value)
