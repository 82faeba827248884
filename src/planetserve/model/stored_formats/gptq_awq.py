"""GPTQ and AWQ: whole numbers packed into int32, zero points and scales for groups of inputs.

Both store a weight `[out, in]` the other way round. GPTQ (version 1) packs along the inputs and
keeps zero points less one; AWQ (`gemm`) packs eight neighbouring outputs in an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planetserve.errors import ModelError
from planetserve.model.stored_formats.base import (
    FLOATS,
    ROWS,
    Header,
    Headers,
    Layout,
    Method,
    Rule,
    Settings,
    Tensors,
    expect,
    unpack_codes,
    unpack_int32,
)
from planetserve.native.quantized import Numbers

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where each of eight outputs is in its int32."""


def _check_gptq(settings: Settings) -> None:
    bits = settings.get("bits")
    if bits not in (2, 4, 8):
        raise ModelError(f"GPTQ with bits {bits!r} is not read, only 2, 4 and 8")


def _check_awq(settings: Settings) -> None:
    bits = settings.get("bits", settings.get("w_bit"))
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ModelError(f"AWQ of {bits!r} bits in version {version!r} is not read, only 4 in gemm")


def _matrix(header: Header, what: str) -> tuple[int, int]:
    expect(header, what, (torch.int32,))
    if len(header.shape) != 2:
        raise ModelError(f"{header.name} ({what}) has shape {header.shape}, which is no matrix")
    return header.shape[0], header.shape[1]


def _gptq_layout(headers: Headers, settings: Settings) -> Layout:
    bits = int(settings["bits"])
    per_word = 32 // bits
    rows, height = _matrix(headers["weight"], "the weight")
    width = rows * per_word
    groups = _groups(headers["scale"], width, height, settings.get("group_size"))
    expect(headers["zero"], "its zero points", (torch.int32,), (groups, height // per_word))
    group_of = headers.get("group_of")
    if group_of is not None:
        expect(group_of, "its groups", (torch.int32, torch.int64), (width,))
    less_one = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        group_of_K = torch.arange(width) // (width // groups)
        if group_of is not None:
            group_of_K = tensors["group_of"].long()
            if not bool(((group_of_K >= 0) & (group_of_K < groups)).all()):
                raise ModelError(f"its groups are not all between 0 and {groups - 1}")
        numbers = unpack_int32(tensors["weight"].t(), bits)
        zeros_GN = unpack_int32(tensors["zero"], bits) + less_one
        return _dequantised(numbers, zeros_GN, tensors["scale"], group_of_K, dtype)

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        in_order = torch.arange(width) // (width // groups)
        if group_of is not None and not bool((tensors["group_of"] == in_order).all()):
            raise ModelError(
                "its groups do not follow one another, though desc_act is false; serve it with "
                "--quant_type none"
            )
        codes_NK = unpack_codes(tensors["weight"].t(), bits)
        zeros_GN = unpack_int32(tensors["zero"], bits) + less_one
        yield _as_numbers(codes_NK, zeros_GN, tensors["scale"])

    # Groups that do not follow one another (`desc_act`) show in the tensor only.
    can_keep = bits == 4 and (group_of is None or settings.get("desc_act") is False)
    return Layout((height, width), decode, numbers if can_keep else None)


def _awq_layout(headers: Headers, settings: Settings) -> Layout:
    width, words = _matrix(headers["weight"], "the weight")
    height = 8 * words
    size = settings.get("group_size", settings.get("q_group_size"))
    groups = _groups(headers["scale"], width, height, size)
    expect(headers["zero"], "its zero points", (torch.int32,), (groups, words))

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return unpack_int32(packed, 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        group_of_K = torch.arange(width) // (width // groups)
        numbers = unpack(tensors["weight"]).t()
        return _dequantised(numbers, unpack(tensors["zero"]), tensors["scale"], group_of_K, dtype)

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        codes_NK = unpack(tensors["weight"]).t()
        yield _as_numbers(codes_NK, unpack(tensors["zero"]), tensors["scale"])

    return Layout((height, width), decode, numbers)


def _as_numbers(codes_NK: torch.Tensor, zeros_GN: torch.Tensor, scales_GN: torch.Tensor) -> Numbers:
    return Numbers(
        codes_NK.to(torch.uint8).contiguous(),
        scales_GN.t().contiguous(),
        zeros_GN.t().to(torch.uint8).contiguous(),
        torch.ones(len(codes_NK)),
        torch.arange(16.0),
    )


def _groups(scale: Header, width: int, height: int, size: Any) -> int:
    """How many groups of inputs have scales of their own."""
    size = width if size in (None, -1) else size
    if type(size) is not int or size <= 0:
        raise ModelError(f"its configuration gives group_size {size!r}")
    groups = -(-width // size)
    expect(scale, "its scales", FLOATS, (groups, height))
    if width % groups:
        raise ModelError(f"{scale.name}: rows of {width} are not {groups} groups of one size")
    return groups


def _dequantised(
    numbers_NK: torch.Tensor,
    zeros_GN: torch.Tensor,
    scales_GN: torch.Tensor,
    group_of_K: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    height, width = numbers_NK.shape
    result = torch.empty(height, width, dtype=dtype)
    for start in range(0, height, ROWS):
        part = slice(start, start + ROWS)
        zeros = zeros_GN[:, part].t().float()[:, group_of_K]
        scales = scales_GN[:, part].t().float()[:, group_of_K]
        result[part] = (numbers_NK[part].float() - zeros) * scales
    return result


_REQUIRED = {"weight": ".qweight", "scale": ".scales", "zero": ".qzeros"}

GPTQ = Method(
    (Rule(".qweight", ".weight", _REQUIRED, _gptq_layout, {"group_of": ".g_idx"}),), _check_gptq
)
AWQ = Method((Rule(".qweight", ".weight", _REQUIRED, _awq_layout, {}),), _check_awq)
