"""Whole numbers of 4 or 8 bits packed into int32 along the rows, with scales for groups of them.

compressed-tensors' `pack-quantized`: `weight_packed` `[N, K bits / 32]`, numbers with an offset of
half their range; zero points, if any, are packed along the other dimension.
"""

from __future__ import annotations

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    FLOATS,
    ROWS,
    Headers,
    Layout,
    Settings,
    Tensors,
    expect,
    unpack_int32,
)


def packed_layout(headers: Headers, settings: Settings) -> Layout:
    """Roles `weight`, `scale`, and perhaps `shape`, `zero_point` and `group_of`."""
    weight, scale = headers["weight"], headers["scale"]
    expect(weight, "the weight", (torch.int32,))
    expect(scale, "its scales", FLOATS)
    if len(weight.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != weight.shape[0]:
        raise ModelError(
            f"{scale.name} (its scales) has shape {scale.shape}, which does not fit numbers packed "
            f"as {weight.shape}"
        )
    bits = _bits(settings)
    height, width = weight.shape[0], weight.shape[1] * 32 // bits
    groups = scale.shape[1]
    if not 0 < groups <= width or width % groups:
        raise ModelError(f"{scale.name} (its scales) has {groups} groups for rows of {width}")
    zero = headers.get("zero_point")
    if zero is not None:
        expect(zero, "its zero points", (torch.int32,), (-(-height * bits // 32), groups))
    group_of = headers.get("group_of")
    if group_of is not None:
        expect(group_of, "its groups", (torch.int32, torch.int64), (width,))

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        said = tensors.get("shape")
        if said is not None and tuple(said.tolist()) != (height, width):
            raise ModelError(f"its weight_shape is {said.tolist()}, not [{height}, {width}]")
        half = 1 << (bits - 1)
        columns = torch.arange(width) // (width // groups)
        if group_of is not None and int(tensors["group_of"].max()) >= 0:
            columns = tensors["group_of"].long()
            if not bool(((columns >= 0) & (columns < groups)).all()):
                raise ModelError(f"its groups are not all between 0 and {groups - 1}")
        zeros = torch.zeros(height, groups)
        if zero is not None:
            zeros = unpack_int32(tensors["zero_point"].t(), bits).t()[:height].float() - half
        result = torch.empty(height, width, dtype=dtype)
        for start in range(0, height, ROWS):
            part = slice(start, start + ROWS)
            numbers = unpack_int32(tensors["weight"][part], bits).float() - half
            scales = tensors["scale"][part].float()
            result[part] = (numbers - zeros[part][:, columns]) * scales[:, columns]
        return result

    return Layout((height, width), decode)


def _bits(settings: Settings) -> int:
    found = {
        group["weights"].get("num_bits")
        for group in (settings.get("config_groups") or {}).values()
        if isinstance(group, dict)
        and isinstance(group.get("weights"), dict)
        and group["weights"].get("type", "int") == "int"
    }
    if len(found) != 1 or not found <= {4, 8}:
        raise ModelError(
            f"its configuration gives packed numbers {sorted(map(str, found)) or 'no'} bits; 4 "
            "or 8 are read"
        )
    bits: int = found.pop()
    return bits
