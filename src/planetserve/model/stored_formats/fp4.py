"""Numbers of 4 bits, two in a byte, with scales of their own for each 16 or 32 of a row.

NVFP4: FP8 scales for each 16, and one float32 scale for all (ModelOpt multiplies by it, compressed-
tensors divides). MXFP4: exponents for each 32.
"""

from __future__ import annotations

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    EXPONENTS,
    ROWS,
    Headers,
    Layout,
    Settings,
    Tensors,
    expect,
    powers_of_two,
    unpack_fp4,
)


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

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        scales = tensors["scale"]
        scales = powers_of_two(scales) if scales.dtype in EXPONENTS else scales.float()
        if role is not None:
            of_all = tensors[role].float()
            of_all = of_all.reshape(*of_all.shape[: len(shape) - 2], 1, 1)
            scales = scales * of_all if role == "multiplier" else scales / of_all
        result = torch.empty(shape, dtype=dtype)
        rows = zip(tensors["weight"].flatten(0, -2).split(ROWS), scales.flatten(0, -2).split(ROWS),
                   result.view(-1, shape[-1]).split(ROWS), strict=True)  # fmt: skip
        for packed, scale_part, part in rows:
            numbers = unpack_fp4(packed, torch.float32).unflatten(-1, (-1, group))
            part.copy_((numbers * scale_part.unsqueeze(-1)).flatten(-2))
        return result

    return Layout(shape, decode)
