"""The kernel that reads a weight as PyTorch keeps it gives what PyTorch gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from planetserve.model import few_rows
from planetserve.native import library

needs_kernels = pytest.mark.skipif(
    library.kernels() is None or not library.kernels().reads_plain_weights,
    reason="the kernels were not compiled",
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (5, 3), (64, 128), (101, 1000), (7, 2050), (131, 5003)]
)
def test_every_instruction_set_agrees_with_pytorch(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    kernels = library.kernels()
    tolerance = 1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    try:
        for level in range(1, kernels.level + 1):
            kernels.use_level(level)
            for rows in range(1, few_rows.MAX_ROWS + 1):
                x = torch.randn(rows, inputs + 3, generator=generator).to(dtype)[:, :inputs]
                for given in (bias, None):
                    exact = F.linear(x.double(), weight.double(), None)
                    exact = exact if given is None else exact + given.double()
                    error = (kernels.linear_rows(x, weight, given).double() - exact).norm()
                    assert error <= tolerance * max(1, exact.norm())
    finally:
        kernels.use_level(None)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(20, 8),
        torch.randn(8, 20).t(),
        torch.randn(20, 8, dtype=torch.float64),
        torch.randn(20, 8).half(),
    ],
    ids=["plain", "transposed", "double", "half"],
)
@pytest.mark.parametrize("rows", [0, 1, 16, 17])
def test_what_the_kernel_does_not_take_is_pytorchs(weight: torch.Tensor, rows: int) -> None:
    x = torch.randn(rows, 8).to(weight.dtype)
    assert torch.allclose(few_rows.linear(x, weight), F.linear(x, weight), rtol=1e-3, atol=1e-4)


def test_a_weight_without_a_kernel_is_not_timed() -> None:
    assert not few_rows.faster_rows(torch.randn(4, 4, dtype=torch.float64))


@needs_kernels
def test_the_kernel_multiplies_only_as_many_rows_as_it_is_faster_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(_forms: object, _weight: object, rows: tuple[int, ...]) -> list[list[float]]:
        return [[1.0] * len(rows), [2.0 if count == 8 else 0.5 for count in rows]]

    monkeypatch.setattr(few_rows, "time_all", timed)
    others = {*range(1, 5), *range(9, few_rows.MAX_ROWS + 1)}
    assert few_rows.faster_rows(torch.randn(4, 4)) == others
