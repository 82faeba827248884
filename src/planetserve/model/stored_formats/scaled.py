"""Weights as numbers of 8 bits and scales: FP8 of several makers, and int8.

Scales are one for the tensor, one for each row, or one for each block of a grid, and multiply.
DeepSeek's block FP8 (`weight_scale_inv`), static FP8 per tensor, fbgemm's rows, MXFP8's exponents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    EXPONENTS,
    FLOATS,
    FP8,
    Headers,
    Layout,
    Method,
    Rule,
    Settings,
    Tensors,
    expect,
    powers_of_two,
    scale_blocks,
)
from planetserve.native.quantized import Numbers


def scaled_layout(headers: Headers, settings: Settings) -> Layout:
    """Numbers of 8 bits with scales, and zero points perhaps."""
    weight, scale = headers["weight"], headers["scale"]
    expect(weight, "the weight", (*FP8, torch.int8))
    if len(weight.shape) < 2:
        raise ModelError(f"{weight.name} has shape {weight.shape}, which is no matrix")
    expect(scale, "its scales", (*FLOATS, *EXPONENTS))
    found = _grid(weight.shape, scale.shape, _block(settings))
    if found is None:
        raise ModelError(
            f"{scale.name} (its scales) has shape {scale.shape}, which does not fit a weight of "
            f"shape {weight.shape}"
        )
    grid, block = found
    zero = headers.get("zero_point")
    if zero is not None:
        expect(zero, "its zero points", (torch.int8,), scale.shape)

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        scales = tensors["scale"]
        scales = powers_of_two(scales) if scales.dtype in EXPONENTS else scales
        numbers = tensors["weight"]
        if zero is not None:
            zeros = tensors["zero_point"].float().reshape(grid)
            ones = torch.ones((), dtype=torch.int8).expand(weight.shape)
            numbers = numbers.float() - scale_blocks(ones, zeros, block, torch.float32)
        return scale_blocks(numbers, scales.reshape(grid), block, dtype)

    height, width = weight.shape[-2:]

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        scale = tensors["scale"]
        scale = scale.view(torch.float8_e8m0fnu) if scale.dtype in EXPONENTS else scale
        scale = scale.reshape(grid).expand(*weight.shape[:-2], *grid[-2:])
        codes = tensors["weight"].reshape(-1, height, width)
        for codes_NK, scales_nG in zip(codes, scale.reshape(-1, *grid[-2:]), strict=True):
            if codes_NK.dtype in FP8 and bool((codes_NK.view(torch.uint8) & 127 == 127).any()):
                raise ModelError("it holds numbers that are none (NaN)")
            scales_NG = _rows_of_blocks(scales_nG, block[0], height)
            if grid[-1] == 1:
                yield Numbers(codes_NK, None, None, scales_NG[:, 0].float())
            else:
                yield Numbers(codes_NK, scales_NG, None, torch.ones(height))

    can_keep = (
        zero is None and weight.dtype is not torch.float8_e5m2 and grid[-1] * block[1] == width
    )
    return Layout(weight.shape, decode, numbers if can_keep else None)


def _rows_of_blocks(scales_nG: torch.Tensor, rows: int, height: int) -> torch.Tensor:
    """The scales of each row's blocks, `[height, G]`, as they are stored."""
    blocks_N = torch.arange(height) // rows
    bits = scales_nG.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[scales_nG.itemsize])
    return bits[blocks_N].view(scales_nG.dtype)


def _block(settings: Settings) -> tuple[int, int] | None:
    """Rows and columns of a block, if the configuration gives them."""
    given: Any = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():
        given = given or ((group.get("weights") or {}).get("block_structure"))
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(type(size) is int and size > 0 for size in given)
    ):
        raise ModelError(f"its configuration gives blocks of {given!r}")
    return given[0], given[1]


def _grid(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, int]] | None:
    """The scales' shape with as many dimensions as the weight, and the size of a block.

    None if they do not fit the weight.
    """
    *outer, height, width = weight
    ones = (1,) * len(outer)
    if len(scale) == 4 and len(weight) == 2 and scale[1] == scale[3] == 1:  # ModelOpt's blocks
        scale = (scale[0], scale[2])
    if block is not None:
        grid = (-(-height // block[0]), -(-width // block[1]))
        if scale in ((*outer, *grid), (*ones, *grid)):
            return scale, block
    if all(size == 1 for size in scale):
        return (*ones, 1, 1), (height, width)
    if scale in ((*outer, height), (*outer, height, 1)):
        return (*outer, height, 1), (1, width)
    if outer and scale in (tuple(outer), (*outer, 1), (*outer, 1, 1)):
        return (*outer, 1, 1), (height, width)
    if len(scale) != len(weight) or scale[:-2] not in (tuple(outer), ones):
        return None
    rows, columns = scale[-2:]
    if block is not None and columns == -(-width // block[1]) and rows not in (1, height):
        return None
    if not rows or not columns or height % rows or width % columns:
        return None
    return scale, (height // rows, width // columns)


SCALE_INV = Rule(
    marker="_scale_inv",
    weight="",
    required={"weight": "", "scale": "_scale_inv"},
    optional={},
    layout=scaled_layout,
)
WEIGHT_SCALE = Rule(
    marker=".weight_scale",
    weight=".weight",
    required={"weight": ".weight", "scale": ".weight_scale"},
    optional={"zero_point": ".weight_zero_point"},
    layout=scaled_layout,
)

FINE_GRAINED_FP8 = Method((SCALE_INV, WEIGHT_SCALE))
FBGEMM_FP8 = Method((WEIGHT_SCALE,))
