"""Experts as converted linear layers: the same sums for any routing, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planetserve.model import experts
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.linear_backends import BACKENDS, PLAIN
from planetserve.model.span_blocks import SpanBlocks
from planetserve.native import library
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.types import BlockSpan

WITH_EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "aria_text", "deepseek_v3", "flex_olmo"]
"""Among them transposed weights, biases, and gates that are interleaved."""

needs_kernels = pytest.mark.skipif(
    library.kernels() is None, reason="the kernels were not compiled"
)


def load_experts(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(folder, family)))
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, checkpoint.num_blocks), dtype)
    found = [m for m in blocks.layers.modules() if experts.why_not_convertible(m) is None]
    return found[0]


def route(module: Any, num_tokens: int, num_chosen: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    dtype = module.down_proj.dtype
    hidden_TD = torch.randn(num_tokens, 32, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, module.num_experts, generator=generator).to(dtype)
    weights_TK, chosen_TK = scores.topk(num_chosen)
    return hidden_TD, chosen_TK, weights_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_kernels), "packed"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
@torch.inference_mode()
def test_converted_experts_give_the_same(
    family: str, backend: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = load_experts(family, tmp_path, dtype)
    converted = copy.deepcopy(plain)
    became = experts.convert(converted, BACKENDS.create(backend).convert, PLAIN)
    if backend == "packed" and not torch.backends.mkldnn.is_available():
        assert became == PLAIN
        return
    assert became == backend
    assert experts.is_split(converted)
    assert converted.down_proj.equal(plain.down_proj)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for num_tokens in (1, 2, 7, 40):
        for num_chosen in (1, 2, plain.num_experts):
            routed = route(plain, num_tokens, num_chosen)
            expected = plain(*routed).float()
            assert (converted(*routed).float() - expected).norm() <= tolerance * expected.norm()


@needs_kernels
@torch.inference_mode()
def test_one_expert_may_get_every_token(tmp_path: Path) -> None:
    plain = load_experts("mixtral", tmp_path)
    converted = copy.deepcopy(plain)
    experts.convert(converted, BACKENDS.create("native").convert, PLAIN)
    hidden_TD = torch.randn(5, 32)
    chosen_T1 = torch.full((5, 1), 3)
    weights_T1 = torch.rand(5, 1)
    expected = plain(hidden_TD, chosen_T1, weights_T1)
    assert torch.allclose(converted(hidden_TD, chosen_T1, weights_T1), expected, atol=1e-5)


@needs_kernels
@torch.inference_mode()
def test_unpacked_experts_are_the_old_ones(tmp_path: Path) -> None:
    plain = load_experts("gpt_oss", tmp_path)
    module = copy.deepcopy(plain)
    experts.convert(module, BACKENDS.create("native").convert, PLAIN)
    held = sum(p.numel() for p in module.parameters())
    assert held < 1.2 * sum(p.numel() for p in plain.parameters())  # not both
    experts.unpack(module)
    assert type(module) is type(plain)
    state, old = module.state_dict(), plain.state_dict()
    assert state.keys() == old.keys()
    assert all(state[name].equal(old[name]) for name in old)
    routed = route(plain, 4, 2)
    assert module(*routed).equal(plain(*routed))


@needs_kernels
@torch.inference_mode()
def test_experts_stay_as_they_are_if_one_cannot_be_converted(tmp_path: Path) -> None:
    plain = load_experts("mixtral", tmp_path)
    module = copy.deepcopy(plain)
    backend, calls = BACKENDS.create("native"), []

    def convert_but_the_last(layer: nn.Module) -> str:
        calls.append(layer)
        return PLAIN if len(calls) == 2 * plain.num_experts else backend.convert(layer)

    assert experts.convert(module, convert_but_the_last, PLAIN) == PLAIN
    assert type(module) is type(plain)
    assert module.gate_up_proj.equal(plain.gate_up_proj)


@needs_kernels
@torch.inference_mode()
def test_wrong_products_are_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = load_experts("mixtral", tmp_path)
    module = copy.deepcopy(plain)
    backend = BACKENDS.create("native")

    def convert_wrongly(layer: Any) -> str:
        became = backend.convert(layer)
        layer.bias = nn.Parameter(torch.ones(layer.num_outputs), requires_grad=False)
        return became

    assert experts.convert(module, convert_wrongly, PLAIN) == PLAIN
    assert "something else" in caplog.text
    assert type(module) is type(plain)
    assert module.down_proj.equal(plain.down_proj)


def test_a_failure_in_converting_is_not_taken_for_the_familys(tmp_path: Path) -> None:
    module = load_experts("mixtral", tmp_path)

    def fail(layer: nn.Module) -> str:
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        experts.convert(module, fail, PLAIN)


def test_other_modules_have_no_experts(tmp_path: Path) -> None:
    assert "Linear is no experts module" in (experts.why_not_convertible(nn.Linear(2, 2)) or "")
    module = load_experts("mixtral", tmp_path)
    module.register_forward_hook(lambda *_: None)
    assert experts.why_not_convertible(module) == "something is hooked to it"
