"""What a storage format of quantised weights is: endings of names, a check of headers, a decoder.

A stored weight is several tensors (its numbers, their scales, ...) of one *stem*. A `Rule` finds
them by the endings of their names, says from their headers what they stand for, and turns them into
a floating-point weight. Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planetserve.errors import ModelError
from planetserve.native.quantized import Numbers


@dataclass(frozen=True, slots=True)
class Header:
    """Of one stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


Headers = Mapping[str, Header]
"""Role -> header; roles of tensors that are not there are left out."""
Tensors = Mapping[str, torch.Tensor]
"""Role -> tensor."""
Settings = Mapping[str, Any]
"""The checkpoint's `quantization_config`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One weight whose headers fit together."""

    shape: tuple[int, ...] | None
    """None if only the tensors say it."""
    decode: Callable[[Tensors, torch.dtype], torch.Tensor]
    numbers: Callable[[Tensors], Iterator[Numbers]] | None = None
    """The matrices as they are stored, one after the other; None if they cannot be used as such."""
    is_transposed: bool = False
    """Whether `decode` gives the transpose of what `numbers` does."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to store a weight.

    Attributes:
        marker: ending of the tensor by which such a weight is recognised.
        weight: ending of the weight's own name.
        required: role -> ending of tensors that must be there, the marker among them.
        optional: role -> ending of others.
        layout: checks headers.

    `layout` raises `ModelError`s whose text goes on after the weight's name.
    """

    marker: str
    weight: str
    required: Mapping[str, str]
    layout: Callable[[Headers, Settings], Layout]
    optional: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Method:
    """A `quant_method` of configurations: its rules, the first that fits a stem counts."""

    rules: tuple[Rule, ...]
    check: Callable[[Settings], None] = lambda settings: None
    """Refuses settings that the rules do not cover."""


def expect(header: Header, what: str, dtypes: tuple[torch.dtype, ...], *shapes: Any) -> None:
    """Refuse a tensor of another dtype, or of none of the shapes.

    Raises:
        ModelError: names the tensor.
    """
    if header.dtype not in dtypes:
        names = " or ".join(name_of(dtype) for dtype in dtypes)
        raise ModelError(f"{header.name} ({what}) is {name_of(header.dtype)}, not {names}")
    if shapes and header.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ModelError(f"{header.name} ({what}) has shape {header.shape}, not {wanted}")


def name_of(dtype: torch.dtype) -> str:
    """As people write it."""
    return str(dtype).removeprefix("torch.")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

ROWS = 512
"""Rows of a matrix that are unpacked at a time."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


FP4_TABLE = torch.tensor([*_FP4, *(-x for x in _FP4)])
"""What the 16 codes of E2M1 mean."""


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two codes in each byte, the first in the low half: `[..., n]` to `[..., 2 n]`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpack_fp4(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two numbers of E2M1 in each byte, the first in the low half: `[..., n]` to `[..., 2 n]`."""
    return FP4_TABLE.to(dtype)[unpack_nibbles(packed).int()]


def unpack_int32(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of `bits` bits, lowest first: `[..., n]` to `[..., 32 n / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def unpack_codes(packed_NW: torch.Tensor, bits: int) -> torch.Tensor:
    """The same of a matrix as uint8, some rows at a time."""
    height, words = packed_NW.shape
    codes_NK = torch.empty(height, words * 32 // bits, dtype=torch.uint8)
    for rows, packed in zip(codes_NK.split(ROWS), packed_NW.split(ROWS), strict=True):
        rows.copy_(unpack_int32(packed, bits))
    return codes_NK


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Scales stored as biased exponents (UE8M0), as float32."""
    if exponents.dtype == torch.uint8:
        exponents = exponents.view(torch.float8_e8m0fnu)
    return exponents.float()


def scale_blocks(
    numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Numbers `[..., N, K]` times one scale for each block of a grid `[..., n, k]`.

    Computed in float32, some rows at a time; the last blocks of a row or column may be smaller.
    """
    height, width = numbers.shape[-2:]
    result = torch.empty(numbers.shape, dtype=dtype)
    matrices = zip(
        numbers.reshape(-1, height, width),
        scales.expand(*numbers.shape[:-2], *scales.shape[-2:]).reshape(-1, *scales.shape[-2:]),
        result.view(-1, height, width),
        strict=True,
    )
    step = -(-ROWS // block[0]) * block[0]
    for numbers_NK, scales_nk, result_NK in matrices:
        for start in range(0, height, step):
            part = numbers_NK[start : start + step].float()
            rows_nk = scales_nk[start // block[0] : (start + step) // block[0]].float()
            wide_NK = rows_nk.repeat_interleave(block[0], dim=0)[: len(part)]
            wide_NK = wide_NK.repeat_interleave(block[1], dim=1)[:, :width]
            result_NK[start : start + step] = part.mul_(wide_NK)
    return result
