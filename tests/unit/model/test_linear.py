"""Linear backends: the same results, less memory, and plain layers wherever there is doubt."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from planetserve.errors import ConfigError
from planetserve.model import converted_linear, experts, onednn_linear
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.converted_linear import unpack
from planetserve.model.linear import convert_span
from planetserve.model.linear_backends import BACKENDS, Auto, Native, Packed
from planetserve.model.native_linear import NativeLinear
from planetserve.model.onednn_linear import PackedLinear
from planetserve.model.span_blocks import SpanBlocks
from planetserve.native import library
from planetserve.testing.checkpoints import SERVABLE_FAMILIES, make_tiny_checkpoint
from planetserve.types import BlockSpan

DTYPES = [torch.float32, torch.bfloat16]

needs_kernels = pytest.mark.skipif(
    library.kernels() is None, reason="the kernels were not compiled"
)
needs_packing = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def make_layer(
    num_in: int = 48, num_out: int = 80, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias=bias, dtype=dtype).requires_grad_(False)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["packed", "native", "plain", "auto"])
def test_every_backend_gives_the_plain_product(name: str, bias: bool, dtype: torch.dtype) -> None:
    plain = make_layer(bias=bias, dtype=dtype)
    layer = copy.deepcopy(plain)
    BACKENDS.create(name).convert(layer)
    for shape in [(48,), (1, 48), (2, 48), (0, 48), (1, 1, 48), (2, 3, 48), (1, 130, 48)]:
        x = torch.randn(shape).to(dtype)
        assert layer(x).shape == plain(x).shape
        assert close(layer(x), plain(x))
    x = torch.randn(48, 7).to(dtype).t()
    assert close(layer(x), plain(x))
    assert torch.equal(layer.weight, plain.weight)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 12, 14, 15, 16, 17, 29, 40, 100])
def test_the_kernels_multiply_any_number_of_rows(num_rows: int, dtype: torch.dtype) -> None:
    plain = make_layer(50, 83, dtype=dtype)
    layer = copy.deepcopy(plain)
    assert Native().convert(layer) == "native"
    assert isinstance(layer, NativeLinear)
    assert torch.equal(layer.weight, plain.weight)
    x = torch.randn(num_rows, 50).to(dtype)
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()
    unpack(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, plain.weight)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_products(dtype: torch.dtype) -> None:
    kernels = library.kernels()
    weight, x, add = (torch.randn(shape).to(dtype) for shape in [(83, 50), (19, 50), (19, 83)])
    exact = x.double() @ weight.double().t() + add.double()
    for level in range(1, kernels.level + 1):
        kernels.use_level(level)
        try:
            result = kernels.linear(x, library.pack(weight), 83, add_TO=add)
        finally:
            kernels.use_level(None)
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3
        assert (result.double() - exact).norm() <= tolerance * exact.norm()


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_holds_its_weight_once(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    assert Packed().convert(layer) == "packed"
    assert isinstance(layer, PackedLinear)
    assert sorted(name for name, _ in layer.named_parameters()) == ["bias", "packed"]
    assert sum(value.numel() for value in layer.parameters()) == 48 * 80 + 80
    assert {value.dtype for value in layer.parameters()} == {dtype}


@needs_packing
def test_a_packed_layer_can_be_made_plain_again() -> None:
    plain = make_layer()
    layer = copy.deepcopy(plain)
    Packed().convert(layer)
    unpack(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer(torch.ones(48)), plain(torch.ones(48)))


@needs_packing
def test_gpt2_layers_are_packed_too() -> None:
    plain = Conv1D(80, 48).requires_grad_(False)
    layer = copy.deepcopy(plain)
    assert Packed().convert(layer) == "packed"
    x = torch.randn(2, 3, 48)
    assert close(layer(x), plain(x))
    assert torch.equal(layer.weight, plain.weight)


@needs_packing
def test_gradients_pass_through_a_packed_layer() -> None:
    plain = make_layer()
    layer = copy.deepcopy(plain)
    Packed().convert(layer)
    inputs = [torch.ones(1, 48, requires_grad=True) for _ in range(2)]
    plain(inputs[0]).sum().backward()
    layer(inputs[1]).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


class OwnLinear(nn.Linear):
    """A family's own idea of a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.sign(), self.bias)


def hooked() -> nn.Linear:
    layer = make_layer()
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        OwnLinear(48, 80),
        hooked(),
        make_layer(dtype=torch.float64),
        nn.Linear(48, 80, device="meta"),
    ],
    ids=["subclass", "hook", "float64", "device"],
)
@pytest.mark.parametrize("name", ["packed", "native", "auto"])
def test_other_layers_stay_as_they_are(name: str, layer: nn.Module) -> None:
    weight = layer.weight
    assert BACKENDS.create(name).convert(layer) == "plain"
    assert layer.weight is weight


def test_a_packed_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = onednn_linear.product
    monkeypatch.setattr(onednn_linear, "product", lambda *args: right(*args) * 1.0001)
    layer = make_layer()
    assert Packed().convert(layer) == "plain"
    assert type(layer) is nn.Linear


def test_a_weight_that_is_not_finite_stays_plain() -> None:
    layer = make_layer()
    layer.weight[3, 4] = float("nan")
    assert Packed().convert(layer) == "plain"


def test_without_the_operators_everything_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "_operators", lambda: None)
    monkeypatch.setattr(library, "kernels", lambda: None)
    layer = make_layer(320, 320)
    assert Packed().convert(layer) == "plain"
    assert Auto().convert(layer) == "plain"


def test_auto_times_a_shape_once_and_leaves_small_layers_alone() -> None:
    auto = Auto()
    assert auto.convert(make_layer()) == "plain"
    assert auto.reasons() == ""
    layers = [make_layer(512, 256) for _ in range(3)]
    assert len({auto.convert(layer) for layer in layers}) == 1
    assert auto.reasons().count("256x512") == 1


@needs_kernels
def test_auto_makes_small_layers_native_beside_native_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Auto, "_choose", lambda *_: Native())
    auto = Auto()
    assert [auto.convert(make_layer(*size)) for size in ((512, 256), (64, 32))] == ["native"] * 2


def test_an_unknown_backend_is_refused(llama: Path) -> None:
    blocks = SpanBlocks.load(Checkpoint.open(str(llama)), BlockSpan(0, 1), torch.float32)
    with pytest.raises(ConfigError, match="auto, native, packed, plain"):
        convert_span(blocks, "fast")


@pytest.mark.parametrize("family", SERVABLE_FAMILIES)
@pytest.mark.parametrize(
    "backend",
    [pytest.param("packed", marks=needs_packing), pytest.param("native", marks=needs_kernels)],
)
def test_a_packed_span_is_the_plain_one(backend: str, family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, family)))
    span = BlockSpan(0, min(2, checkpoint.num_blocks))
    plain, packed = (SpanBlocks.load(checkpoint, span, torch.float32) for _ in range(2))
    names = {name for name, _ in packed.layers.named_modules()}
    became = convert_span(packed, backend)
    assert names <= {name for name, _ in packed.layers.named_modules()}
    assert sum(became.values()) == sum(
        type(module) in (*converted_linear.LAYER_TYPES, FalconLinear)
        or experts.why_not_convertible(module) is None
        for module in plain.layers.modules()
    )
    inputs = torch.randn(1, 9, checkpoint.hidden_size).split([5, 1, 1, 2], dim=1)
    outputs = []
    for blocks in (plain, packed):
        cache = blocks.make_cache()
        with torch.inference_mode():
            outputs.append([blocks.run(hidden, past_key_values=cache) for hidden in inputs])
    for expected, actual in zip(*outputs, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_a_subclass_that_multiplies_as_a_linear_layer_does_becomes_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_tiny_checkpoint(tmp_path, "falcon_new")))
    blocks = SpanBlocks.load(checkpoint, BlockSpan(0, 1), torch.float32)
    assert not any(type(module) is nn.Linear for module in blocks.layers.modules())
    became = convert_span(blocks, "native")
    assert set(became) == {"native"}
    assert any(type(module) is NativeLinear for module in blocks.layers.modules())


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@needs_kernels
def test_a_subclass_that_means_something_else_stays(llama: Path) -> None:
    blocks = SpanBlocks.load(Checkpoint.open(str(llama)), BlockSpan(0, 1), torch.float32)
    blocks.layers[0].mlp.down_proj.__class__ = Doubling
    convert_span(blocks, "native")
    assert type(blocks.layers[0].mlp.down_proj) is Doubling
    assert type(blocks.layers[0].mlp.up_proj) is NativeLinear
