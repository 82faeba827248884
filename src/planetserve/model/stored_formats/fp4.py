"""Numbers of 4 bits, two in a byte, with scales of their own for each 16 or 32 of a row.

NVFP4: FP8 scales for each 16, and one float32 scale for all (ModelOpt multiplies by it, compressed-
tensors divides). MXFP4: exponents for each 32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    EXPONENTS,
    FP4_TABLE,
    ROWS,
    Headers,
    Layout,
    Settings,
    Tensors,
    expect,
    powers_of_two,
    unpack_fp4,
    unpack_nibbles,
)
from planetserve.native.quantized import Numbers


def fp4_layout(headers: Headers, settings: Settings) -> Layout:
    """Roles `weight` and `scale`, and `multiplier` or `divisor`."""
    weight, scale = headers["weight"], headers["scale"]
    expect(weight, "the weight", (torch.uint8,))
    if len(weight.shape) < 2:
        raise ModelError(f"{weight.name} has shape {weight.shape}, which is no matrix")
    shape = (*weight.shape[:-1], 2 * weight.shape[-1])
    group = 32 if scale.dtype in EXPONENTS else 16
    expect(scale, "its scales", (torch.float8_e4m3fn, *EXPONENTS),
           (*shape[:-1], shape[-1] // group))  # fmt: skip
    role = next((role for role in ("multiplier", "divisor") if role in headers), None)
    if role is None and group == 16:
        raise ModelError(f"{scale.name} has no scale for the whole weight beside it")
    if role is not None:
        outer = shape[:-2]
        ones = (1,) * len(outer)
        shapes = ((), (1,), outer, (*outer, 1), (*outer, 1, 1), (*ones, 1, 1))
        expect(headers[role], "its scale for all", (torch.float32,), *shapes)

    def scale_of_all(tensors: Tensors) -> torch.Tensor:
        """`[..., 1, 1]`, which multiplies."""
        if role is None:
            return torch.ones([1] * len(shape))
        of_all = tensors[role].float()
        of_all = of_all.reshape(*of_all.shape[: len(shape) - 2], 1, 1)
        return of_all if role == "multiplier" else 1 / of_all

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        scales = tensors["scale"]
        scales = powers_of_two(scales) if scales.dtype in EXPONENTS else scales.float()
        scales = scales * scale_of_all(tensors)
        result = torch.empty(shape, dtype=dtype)
        rows = zip(tensors["weight"].flatten(0, -2).split(ROWS), scales.flatten(0, -2).split(ROWS),
                   result.view(-1, shape[-1]).split(ROWS), strict=True)  # fmt: skip
        for packed, scale_part, part in rows:
            numbers = unpack_fp4(packed, torch.float32).unflatten(-1, (-1, group))
            part.copy_((numbers * scale_part.unsqueeze(-1)).flatten(-2))
        return result

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        scale = tensors["scale"]
        scale = scale.view(torch.float8_e8m0fnu) if scale.dtype in EXPONENTS else scale
        of_all = scale_of_all(tensors).expand(*shape[:-1], 1)
        matrices = (x.flatten(0, -3) if len(shape) > 2 else x[None]
                    for x in (tensors["weight"], scale, of_all))  # fmt: skip
        for packed, scales_NG, factors_N1 in zip(*matrices, strict=True):
            codes_NK = unpack_nibbles(packed)
            yield Numbers(codes_NK, scales_NG, None, factors_N1[:, 0], FP4_TABLE)

    return Layout(shape, decode, numbers)
