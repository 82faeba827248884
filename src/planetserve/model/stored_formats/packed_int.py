"""Whole numbers of 4 or 8 bits packed into int32 along the rows, with scales for groups of them.

compressed-tensors' `pack-quantized`: `weight_packed` `[N, K bits / 32]`, numbers with an offset of
half their range; zero points, if any, are packed along the other dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    FLOATS,
    ROWS,
    Header,
    Headers,
    Layout,
    Settings,
    Tensors,
    expect,
    unpack_codes,
    unpack_int32,
)
from planetserve.native.quantized import Numbers


def packed_layout(headers: Headers, settings: Settings) -> Layout:
    """Roles `weight`, `scale`, and perhaps `shape`, `zero_point` and `group_of`."""
    weight, scale = headers["weight"], headers["scale"]
    _check_matrices(weight, scale)
    bits = _bits(settings)
    height, width = weight.shape[0], weight.shape[1] * 32 // bits
    groups = scale.shape[1]
    if not 0 < groups <= width or width % groups:
        raise ModelError(f"{scale.name} (its scales) has {groups} groups for rows of {width}")
    zero, group_of = headers.get("zero_point"), headers.get("group_of")
    if zero is not None:
        expect(zero, "its zero points", (torch.int32,), (-(-height * bits // 32), groups))
    if group_of is not None:
        expect(group_of, "its groups", (torch.int32, torch.int64), (width,))
    half = 1 << (bits - 1)

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        _check_shape(tensors, (height, width))
        columns = torch.arange(width) // (width // groups)
        if group_of is not None and int(tensors["group_of"].max()) >= 0:
            columns = tensors["group_of"].long()
            if not bool(((columns >= 0) & (columns < groups)).all()):
                raise ModelError(f"its groups are not all between 0 and {groups - 1}")
        zeros = torch.zeros(height, groups)
        if zero is not None:
            zeros = _zeros(tensors, bits, height).float() - half
        result = torch.empty(height, width, dtype=dtype)
        for start in range(0, height, ROWS):
            part = slice(start, start + ROWS)
            numbers = unpack_int32(tensors["weight"][part], bits).float() - half
            scales = tensors["scale"][part].float()
            result[part] = (numbers - zeros[part][:, columns]) * scales[:, columns]
        return result

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        _check_shape(tensors, (height, width))
        codes_NK = unpack_codes(tensors["weight"], bits)
        factors_N = torch.ones(height)
        if bits == 8:
            yield Numbers((codes_NK ^ 128).view(torch.int8), tensors["scale"], None, factors_N)
            return
        zeros_NG = None if zero is None else _zeros(tensors, bits, height)
        table = torch.arange(16.0) - (half if zero is None else 0)
        yield Numbers(codes_NK, tensors["scale"], zeros_NG, factors_N, table)

    can_keep = group_of is None and (bits == 4 or zero is None)
    return Layout((height, width), decode, numbers if can_keep else None)


def _check_shape(tensors: Tensors, shape: tuple[int, int]) -> None:
    said = tensors.get("shape")
    if said is not None and tuple(said.tolist()) != shape:
        raise ModelError(f"its weight_shape is {said.tolist()}, not {list(shape)}")


def _zeros(tensors: Tensors, bits: int, height: int) -> torch.Tensor:
    return unpack_codes(tensors["zero_point"].t(), bits).t()[:height].contiguous()


def _check_matrices(weight: Header, scale: Header) -> None:
    expect(weight, "the weight", (torch.int32,))
    expect(scale, "its scales", FLOATS)
    if len(weight.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != weight.shape[0]:
        raise ModelError(
            f"{scale.name} (its scales) has shape {scale.shape}, which does not fit numbers packed "
            f"as {weight.shape}"
        )


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
