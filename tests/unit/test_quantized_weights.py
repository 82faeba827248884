"""The kernels for weights of 4 and 8 bits a number, on every instruction set of this processor."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from planetserve.native import library
from planetserve.native.quantized import SCALE_DTYPES, Numbers, QuantizedWeight, is_readable

KERNELS = library.kernels()
if KERNELS is None:
    raise RuntimeError("the kernels of this project are not built; run `make venv` again")

ROWS = (1, 2, 3, 4, 5, 14, 31)


@pytest.fixture(params=range(1, KERNELS.level + 1))
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    assert KERNELS is not None
    KERNELS.use_level(request.param)
    yield request.param
    KERNELS.use_level(None)


def made(
    codes: torch.dtype,
    scales: torch.dtype | None,
    *,
    outputs: int = 83,
    inputs: int = 96,
    groups: int = 3,
    has_zeros: bool = False,
) -> Numbers:
    generator = torch.Generator().manual_seed(outputs * inputs + groups)
    table = None
    if codes is torch.uint8:
        codes_OK = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
        table = torch.randn(16, generator=generator)
    elif codes is torch.int8:
        codes_OK = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
    else:  # all numbers, subnormal ones and negative zero among them
        bits = torch.randint(0, 256, (outputs, inputs), generator=generator, dtype=torch.uint8)
        codes_OK = torch.where(bits & 127 == 127, 0, bits).to(torch.uint8).view(codes)
    scales_OG = None
    if scales is torch.float8_e8m0fnu:
        exponents = torch.randint(100, 140, (outputs, groups), generator=generator)
        exponents[0, 0] = 0  # 2**-127, which is subnormal as float32
        scales_OG = exponents.to(torch.uint8).view(scales)
    elif scales is not None:
        scales_OG = (torch.rand(outputs, groups, generator=generator) + 0.1).to(scales)
    zeros_OG = None
    if has_zeros:
        zeros_OG = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    factors_O = torch.rand(outputs, generator=generator) + 0.5
    return Numbers(codes_OK, scales_OG, zeros_OG, factors_O, table)


def dequantised(numbers: Numbers) -> torch.Tensor:
    plain_OK = numbers.codes_OK.double()
    if numbers.table is not None:
        plain_OK = numbers.table.double()[numbers.codes_OK.long()]
    groups_OGK = plain_OK.unflatten(1, (numbers.num_groups, -1))
    if numbers.zeros_OG is not None:
        groups_OGK = groups_OGK - numbers.zeros_OG.double()[..., None]
    if numbers.scales_OG is not None:
        groups_OGK = groups_OGK * numbers.scales_OG.double()[..., None]
    return groups_OGK.flatten(1) * numbers.factors_O.double()[:, None]


def check(weight: QuantizedWeight, expected_OK: torch.Tensor) -> None:
    torch.testing.assert_close(
        weight.dense(torch.float32).double(), expected_OK, rtol=1e-6, atol=1e-30
    )
    generator = torch.Generator().manual_seed(1)
    bias_O = torch.randn(len(expected_OK), generator=generator)
    for rows, bias in itertools.product(ROWS, (None, bias_O)):
        # Rows further apart than they are long, as those of a part of a wider tensor.
        wide = torch.randn(rows, expected_OK.shape[1] + 5, generator=generator)
        x_TK = wide[:, : expected_OK.shape[1]]
        expected = F.linear(x_TK.double(), expected_OK, None if bias is None else bias.double())
        error = (weight.multiply(x_TK, bias).double() - expected).norm() / expected.norm()
        assert error < 1e-5, (rows, float(error))


@pytest.mark.parametrize("scales", [*SCALE_DTYPES, None], ids=str)
@pytest.mark.parametrize("codes", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_products_are_those_of_the_dequantised_weight(
    level: int, codes: torch.dtype, scales: torch.dtype | None
) -> None:
    groups = 1 if scales is None else 3
    numbers = made(codes, scales, groups=groups)
    check(QuantizedWeight([numbers]), dequantised(numbers))


@pytest.mark.parametrize("shape", [(1, 8), (16, 8), (64, 1032), (129, 2048), (15, 640)])
def test_shapes(level: int, shape: tuple[int, int]) -> None:
    """Fewer outputs than a panel, several panels at once and a rest, several tiles of inputs."""
    outputs, inputs = shape
    numbers = made(torch.uint8, torch.bfloat16, outputs=outputs, inputs=inputs, groups=inputs // 8,
                   has_zeros=True)  # fmt: skip
    check(QuantizedWeight([numbers]), dequantised(numbers))


def test_a_group_may_end_within_a_tile(level: int) -> None:
    for codes in (torch.uint8, torch.float8_e4m3fn):
        numbers = made(codes, torch.float32, inputs=5 * 216, groups=5, has_zeros=True)
        check(QuantizedWeight([numbers]), dequantised(numbers))


def test_several_matrices_are_one_weight(level: int) -> None:
    parts = [made(torch.uint8, torch.float16, outputs=n, has_zeros=True) for n in (7, 700, 30)]
    for part in parts[1:]:
        assert part.table is not None
        assert parts[0].table is not None
        part.table.copy_(parts[0].table)
    check(QuantizedWeight(parts), torch.cat([dequantised(part) for part in parts]))


def test_matrices_that_do_not_fit_together_are_refused() -> None:
    one = made(torch.int8, torch.float32)
    for other in (
        made(torch.int8, torch.bfloat16),
        made(torch.float8_e4m3fn, torch.float32),
        made(torch.int8, torch.float32, groups=4),
        made(torch.int8, torch.float32, inputs=48),
        made(torch.int8, torch.float32, has_zeros=True),
    ):
        with pytest.raises(ValueError, match="no common form"):
            QuantizedWeight([one, other])


def test_what_the_kernels_do_not_read() -> None:
    assert is_readable(made(torch.uint8, torch.float32))
    assert not is_readable(made(torch.uint8, torch.float32, inputs=60, groups=5))  # groups of 12
    odd = made(torch.uint8, torch.float32)
    assert odd.scales_OG is not None
    assert not is_readable(dataclasses.replace(odd, scales_OG=odd.scales_OG.double()))


def test_a_weight_takes_little_more_than_its_numbers() -> None:
    """For 4 bits and a bfloat16 scale for 64: 4.25 bits a weight."""
    numbers = made(torch.uint8, torch.bfloat16, outputs=512, inputs=1024, groups=16)
    assert QuantizedWeight([numbers]).num_bytes <= 1.01 * 512 * 1024 * 4.25 / 8
