"""MXFP4 as gpt-oss stores its experts: blocks of 32 numbers of 4 bits with one exponent each.

A weight `[experts, in, out]` is stored as `[experts, out, in / 32, 16]` bytes.
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
    Method,
    Rule,
    Settings,
    Tensors,
    expect,
    powers_of_two,
    unpack_fp4,
    unpack_nibbles,
)
from planetserve.native.quantized import Numbers


def _layout(headers: Headers, settings: Settings) -> Layout:
    blocks, scales = headers["blocks"], headers["scales"]
    expect(blocks, "its blocks", (torch.uint8,))
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
        raise ModelError(f"{blocks.name} has shape {blocks.shape}, not (experts, out, in / 32, 16)")
    expect(scales, "its scales", EXPONENTS, blocks.shape[:-1])
    experts, height, num_blocks, _ = blocks.shape
    width = 32 * num_blocks

    def decode(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        result = torch.empty(experts, width, height, dtype=dtype)
        for expert in range(experts):
            for start in range(0, height, ROWS):
                part = slice(start, start + ROWS)
                numbers = unpack_fp4(tensors["blocks"][expert, part], dtype)
                scale = powers_of_two(tensors["scales"][expert, part]).to(dtype)
                rows = numbers.mul_(scale.unsqueeze(-1)).view(-1, width)
                result[expert, :, part] = rows.t()
        return result

    def numbers(tensors: Tensors) -> Iterator[Numbers]:
        scales = tensors["scales"].view(torch.float8_e8m0fnu)
        for blocks_NGB, scales_NG in zip(tensors["blocks"], scales, strict=True):
            codes_NK = unpack_nibbles(blocks_NGB.flatten(1))
            yield Numbers(codes_NK, scales_NG, None, torch.ones(height), FP4_TABLE)

    return Layout((experts, width, height), decode, numbers, is_transposed=True)


MXFP4 = Method(
    (
        Rule(
            marker="_blocks",
            weight="",
            required={"blocks": "_blocks", "scales": "_scales"},
            optional={},
            layout=_layout,
        ),
    )
)
