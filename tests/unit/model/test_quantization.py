"""Quantised spans: near the unquantised ones, smaller, and refused clearly where they cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from planetserve.errors import ConfigError
from planetserve.model import quantization
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.experts import has_experts, is_split
from planetserve.model.linear import convert_span
from planetserve.model.quantization import block_bytes, require_quantizer
from planetserve.model.span_blocks import SpanBlocks
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan

SPAN = BlockSpan(1, 3)
LARGEST_ERROR = {
    ("int8", torch.float32): 0.1,
    ("int8", torch.bfloat16): 0.1,
    ("nf4", torch.float32): 1e-4,
    ("nf4", torch.bfloat16): 0.1,
}
"""Of outputs, relative to a span with the same rounded weights: int8 rounds activations as well."""

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3_moe"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_tiny_checkpoint(folder, request.param, seed=3, num_hidden_layers=3)
    return Checkpoint.open(str(folder))


def rounded_weight(layer: nn.Module) -> torch.Tensor:
    """The weight `[out, in]` that a quantised layer stands for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        return weight
    # The scales move to the state with the first product.
    scales_O = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scales_O[:, None] / 127


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_rounded_weights(
    checkpoint: Checkpoint, quant_type: str, dtype: torch.dtype
) -> None:
    compare(checkpoint, quant_type, dtype)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_experts_with_biases_are_quantised_too(quant_type: str, tmp_path: Path) -> None:
    # In bfloat16 a near tie between experts can fall either way.
    folder = make_tiny_checkpoint(tmp_path, "gpt_oss", num_hidden_layers=3)
    compare(Checkpoint.open(str(folder)), quant_type, torch.float32)


def compare(checkpoint: Checkpoint, quant_type: str, dtype: torch.dtype) -> None:
    """A quantised span against one that has the same rounded weights."""
    generator = torch.Generator().manual_seed(0)
    hidden_1TD = torch.randn(1, 9, checkpoint.config.hidden_size, generator=generator)
    positions_1T = torch.arange(9)[None]
    with torch.inference_mode():
        blocks = SpanBlocks.load(checkpoint, SPAN, dtype, quant_type=quant_type)
        convert_span(blocks, "auto")
        plain = SpanBlocks.load(checkpoint, SPAN, torch.float32)
        unrounded_1TD = plain.run(hidden_1TD, positions_1T)
        num_quantised = 0
        quantised = dict(blocks.layers.named_modules())
        for name, other in plain.layers.named_modules():
            mine = quantised[name]
            if has_experts(other):
                assert is_split(mine)
                parts = (other.gate_up_proj, mine.entering), (other.down_proj, mine.leaving)
                for weights, layers in parts:
                    rounded = torch.stack([rounded_weight(layer).float() for layer in layers])
                    weights.data = rounded.mT.contiguous() if other.is_transposed else rounded
            if isinstance(other, nn.Linear | Conv1D):
                assert isinstance(mine, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
                weight = rounded_weight(mine).float()
                other.weight.data = weight.T if isinstance(other, Conv1D) else weight
                num_quantised += 1
        assert num_quantised >= 4 * len(SPAN)
        expected_1TD = plain.run(hidden_1TD, positions_1T)
        got_1TD = blocks.run(hidden_1TD.to(dtype), positions_1T).float()
    error = (got_1TD - expected_1TD).norm() / expected_1TD.norm()
    assert error < LARGEST_ERROR[quant_type, dtype]
    assert not torch.allclose(expected_1TD, unrounded_1TD, rtol=1e-3)


def test_memory_is_told_before_anything_is_loaded() -> None:
    block = nn.Sequential(nn.Linear(128, 256, device="meta"), nn.LayerNorm(256, device="meta"))
    weights, rest = 128 * 256, 256 + 2 * 256
    assert block_bytes(block, "none", 2) == 2 * (weights + rest)
    assert block_bytes(block, "int8", 2) == weights + 2 * rest
    assert block_bytes(block, "nf4", 2) == weights * 9 // 16 + 2 * rest


def test_memory_is_told_with_experts(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, "qwen3_moe")))
    block = SpanBlocks.load(checkpoint, BlockSpan(0, 1), torch.float32).layers[0]
    matrices = sum(p.numel() for p in block.mlp.experts.parameters())
    matrices += sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    rest = sum(p.numel() for p in block.parameters()) - matrices
    assert block_bytes(block, "int8", 4) == matrices + 4 * rest
    assert block_bytes(block, "none", 4) == 4 * (matrices + rest)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find(name),
    )
    with pytest.raises(
        ConfigError, match=r"--quant_type nf4 needs bitsandbytes; .*planetserve\[quant\]"
    ):
        require_quantizer("nf4")
